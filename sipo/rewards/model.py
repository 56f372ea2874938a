"""Implicit rewards (Eq. 6): r_i(x, y) = beta · (log pi_i(y|x) − log pi_ref(y|x)), for the policies of a set and for their soups.

One base model computes them all in one pass. A batch row is a model: the reference, a policy or a soup is nothing but a row of
LoRA coefficients (sipo.lora). Along a row lie the prompt once and then all its responses, end to end; attention lets each response
see the prompt and itself. So there is no padding, and no response can change another's value.

Token ids in, rewards out: prompt formats, queues and HTTP are the caller's business. A RewardModel belongs to one thread at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from sipo.errors import IncompatiblePolicy, InvalidRequest
from sipo.lora import TARGETS, StackedLora, load_adapter, stack
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Weights, format_weights, normalize_weights, one_hot_weights

Rewards = dict[str, float]
"""By model: an objective's name for its policy, format_weights(w) for the soup at w."""

LOGIT_ROWS = 128
"""Log-probabilities are taken for so many positions at a time: a [LOGIT_ROWS, vocabulary] float32 block stays in a CPU's cache."""


@dataclass(frozen=True)
class Packing:
    """Where the parts of a packed row lie: `bounds` of prompt, response 1, response 2, …; `masks[j]` is what response j+1 attends
    to (its length × prompt and itself, True = visible)."""

    bounds: list[tuple[int, int]]
    masks: list[Tensor]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packing: Packing,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' form over [rows, heads, length, d]: the prompt sees itself, a response the prompt and itself."""
    (_, prompt), *responses = packing.bounds
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    rows, heads, length, width = query.shape
    out = query.new_empty(rows, length, heads, width)
    out[:, :prompt] = attend(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], is_causal=True).transpose(1, 2)
    for (start, stop), mask in zip(responses, packing.masks, strict=True):
        seen_keys = torch.cat([key[:, :, :prompt], key[:, :, start:stop]], dim=2)
        seen_values = torch.cat([value[:, :, :prompt], value[:, :, start:stop]], dim=2)
        out[:, start:stop] = attend(query[:, :, start:stop], seen_keys, seen_values, attn_mask=mask).transpose(1, 2)
    return out, None


AttentionInterface.register("sipo_packed", packed_attention)


class StackedLinear(nn.Module):
    """base(x) + ((x · A^T) * c) · B^T with one row of coefficients per batch row."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta: tuple[StackedLora, Tensor] | None = None
        """The set's stack for this module, and [rows, 1, R] coefficients expanded to it; None: the base alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[rows, length, in] to [rows, length, out]."""
        out: Tensor = self.base(x)
        if self.delta is None:
            return out
        lora, coefficients = self.delta
        hidden = F.linear(x, lora.a) * coefficients
        return out.flatten(0, 1).addmm_(hidden.flatten(0, 1), lora.b.T).view_as(out)


@dataclass(frozen=True)
class ResidentSet:
    """A policy set ready for scoring: the stack of each module that its adapters change, on the model's device."""

    policy_set: PolicySet
    stacks: dict[str, StackedLora]


class RewardModel:
    """Scores responses under any policy set of the store that was made for this base; the last `keep` sets stay in memory."""

    def __init__(self, model: Any, store: PolicyStore, *, base_sha256: str, keep: int = 2, token_budget: int = 1024) -> None:
        """`model`: a plain transformers causal LM in float32, which the RewardModel takes over. `token_budget`: most tokens in one
        pass, all rows together, unless one response alone has more; a CPU is fastest where a pass stays in its cache."""
        self.store = store
        self.base_sha256 = base_sha256
        self.keep = keep
        self.token_budget = token_budget
        self._resident: OrderedDict[str, ResidentSet] = OrderedDict()
        self._model = model.eval().requires_grad_(False)
        self._linears = _wrap_linears(model)
        config = model.config
        self.vocabulary: int = config.vocab_size
        self.context: int = min(
            config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings
        )
        self._check_packing()

    @classmethod
    def load(cls, folder: Path, store: PolicyStore, *, base_sha256: str, device: str = "cpu", keep: int = 2) -> RewardModel:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        return cls(model, store, base_sha256=base_sha256, keep=keep)

    def policy_set(self, reference: str) -> PolicySet:
        """The set of that id (or current under that name), loaded. Raises NotFound, and IncompatiblePolicy for another base's."""
        return self._load(reference).policy_set

    def score(
        self, policy_set: str, prompt_ids: Sequence[int], responses_ids: Sequence[Sequence[int]], soups: Sequence[Weights] = ()
    ) -> list[Rewards]:
        """The rewards of each response to one prompt under every policy of the set and the soups (exact merges) at `soups`.

        Every id of a response counts: the caller ends a response with the end token if and only if it ended by itself. Raises
        InvalidRequest for an empty prompt or response, for ids that the model does not have and for more tokens than its context.
        """
        resident = self._load(policy_set)
        objectives = resident.policy_set.objectives
        soups = [normalize_weights(weights, objectives, param="weights") for weights in soups]
        names = [*objectives, *map(format_weights, soups)]
        self._check_ids(prompt_ids, responses_ids)
        models = [dict.fromkeys(objectives, 0.0), *(one_hot_weights(objective, objectives) for objective in objectives), *soups]
        coefficients = torch.tensor([list(weights.values()) for weights in models])  # row 0 is the reference

        beta = resident.policy_set.manifest.beta
        rewards: list[Rewards] = []
        for some in self._batches(prompt_ids, responses_ids):
            # A pass is cut by rows first: they share only the reading of weights, responses share the prompt's forward.
            tokens = len(prompt_ids) + sum(map(len, some))
            at_once = max(1, self.token_budget // tokens)
            rows = [coefficients[start : start + at_once] for start in range(0, len(coefficients), at_once)]
            log_probs = torch.cat([self._log_probs(resident.stacks, one, prompt_ids, some) for one in rows])
            differences = beta * (log_probs[1:] - log_probs[0])
            rewards += [dict(zip(names, column, strict=True)) for column in differences.T.tolist()]
        return rewards

    def _check_ids(self, prompt_ids: Sequence[int], responses_ids: Sequence[Sequence[int]]) -> None:
        if not prompt_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        for index, ids in enumerate(responses_ids):
            if not ids:
                raise InvalidRequest(f"response {index} has no tokens: give its text, or at least the end token", param="responses")
            if len(prompt_ids) + len(ids) > self.context:
                raise InvalidRequest(
                    f"prompt ({len(prompt_ids)} tokens) and response {index} ({len(ids)}) are too long: at most {self.context}",
                    param="responses",
                )
        for param, ids in [("prompt", prompt_ids), *(("responses", ids) for ids in responses_ids)]:
            if not 0 <= min(ids) <= max(ids) < self.vocabulary:
                raise InvalidRequest(f"token ids must be 0 to {self.vocabulary - 1}", param=param)

    def _load(self, reference: str) -> ResidentSet:
        policy_set = self.store.get(reference)
        if policy_set.id in self._resident:
            self._resident.move_to_end(policy_set.id)
            return self._resident[policy_set.id]
        policy_set.check_base(self.base_sha256)
        policy_set.verify()
        adapters = [load_adapter(policy_set.adapter_dir(objective)) for objective in policy_set.objectives]
        if unknown := sorted({module for adapter in adapters for module in adapter.modules} - self._linears.keys()):
            raise IncompatiblePolicy(f"{policy_set.id} changes {unknown[0]}, which this base does not have", param="policy_set")
        device = self._model.device
        stacks = {
            module: StackedLora(found.a.to(device), found.b.to(device), found.ranks)
            for module in self._linears
            if (found := stack(adapters, module))
        }
        while len(self._resident) >= self.keep:
            self._resident.popitem(last=False)
        self._resident[policy_set.id] = ResidentSet(policy_set, stacks)
        return self._resident[policy_set.id]

    def _mix(self, stacks: Mapping[str, StackedLora], coefficients: Tensor) -> None:
        """From now on batch row j is the base changed by the adapters with coefficients[j]."""
        coefficients = coefficients.to(self._model.device)
        for module, linear in self._linears.items():
            lora = stacks.get(module) if coefficients.any() else None
            linear.delta = (lora, lora.expand(coefficients).unsqueeze(1)) if lora else None

    def _batches(self, prompt_ids: Sequence[int], responses_ids: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        """The responses in order, as many at a time as one row takes within the token budget, at least one."""
        start, tokens = 0, len(prompt_ids)
        for index, ids in enumerate(responses_ids):
            tokens += len(ids)
            if tokens > self.token_budget and index > start:
                yield responses_ids[start:index]
                start, tokens = index, len(prompt_ids) + len(ids)
        if start < len(responses_ids):
            yield responses_ids[start:]

    @torch.inference_mode()
    def _log_probs(
        self,
        stacks: Mapping[str, StackedLora],
        coefficients: Tensor,
        prompt_ids: Sequence[int],
        responses_ids: Sequence[Sequence[int]],
    ) -> Tensor:
        """log pi(y|x) summed over each response's tokens under each row of coefficients [rows, adapters]: [rows, responses],
        float64 sums of float32 values, on the CPU."""
        rows = len(coefficients)
        self._mix(stacks, coefficients)
        device = self._model.device
        prompt = len(prompt_ids)
        # The last token of a response is predicted, never read.
        bounds = [(0, prompt), *pairwise(accumulate((len(ids) - 1 for ids in responses_ids), initial=prompt))]
        packing = Packing(
            bounds,
            [
                torch.ones(stop - start, prompt + stop - start, dtype=torch.bool, device=device).tril(prompt)
                for start, stop in bounds[1:]
            ],
        )
        ids = [*prompt_ids, *(token for ids in responses_ids for token in ids[:-1])]
        positions = [*range(prompt), *(prompt + step for start, stop in bounds[1:] for step in range(stop - start))]
        hidden = self._model.base_model(
            input_ids=torch.tensor([ids], device=device).expand(rows, -1),
            position_ids=torch.tensor([positions], device=device).expand(rows, -1),
            use_cache=False,
            packing=packing,
        ).last_hidden_state

        # A response's first token is predicted at the prompt's last position, the others at the token before them.
        predictors = [index for start, stop in bounds[1:] for index in (prompt - 1, *range(start, stop))]
        targets = torch.tensor([token for ids in responses_ids for token in ids], device=device)
        flat = hidden[:, torch.tensor(predictors, device=device)].flatten(0, 1)
        head = self._model.get_output_embeddings()
        wanted = targets.repeat(rows)
        chunks = [slice(start, start + LOGIT_ROWS) for start in range(0, len(wanted), LOGIT_ROWS)]
        tokens = -torch.cat([F.cross_entropy(head(flat[chunk]), wanted[chunk], reduction="none") for chunk in chunks])
        ends = accumulate((len(ids) for ids in responses_ids), initial=0)
        per_response = [tokens.view(rows, -1)[:, start:stop].double().sum(dim=1) for start, stop in pairwise(ends)]
        return torch.stack(per_response, dim=1).cpu()

    @torch.inference_mode()
    def _check_packing(self) -> None:
        """Refuses a base that packing does not compute as it computes itself (soft-capped logits, scaled outputs, …)."""
        prompt, responses = [1, 2, 3], [[4, 5, 6, 7], [5, 4]]
        self._model.set_attn_implementation("sdpa")
        wanted = []
        for ids in responses:
            logits = self._model(input_ids=torch.tensor([prompt + ids], device=self._model.device)).logits[0, len(prompt) - 1 : -1]
            wanted.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
        self._model.set_attn_implementation("sipo_packed")
        found = self._log_probs({}, torch.zeros(1, 0), prompt, responses)[0].tolist()
        if max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > 1e-3:
            raise InvalidRequest(
                f"{type(self._model).__name__} cannot be scored: its attention or its outputs are not the usual ones"
            )


def _wrap_linears(model: nn.Module) -> dict[str, StackedLinear]:
    """Puts a StackedLinear around every layer that an adapter may change; by the layer's name in the plain model."""
    linears = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            linears[name] = StackedLinear(module)
            model.set_submodule(name, linears[name])
    return linears
