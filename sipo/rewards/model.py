"""The reward model: the base with the adapters of several policy sets, and the passes in which it scores."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sipo.errors import IncompatiblePolicy, InvalidRequest
from sipo.lora import ADAPTABLE_MODULES, StackedLora, load_adapter, stack
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Weights, format_weights, normalize_weights, one_hot_weights
from sipo.rewards.packing import Group, Packing, rows_of
from sipo.selection import Rewards

TOKEN_BUDGETS = {"cpu": 1024, "cuda": 16384}
"""Tokens in one pass by default. A CPU is fastest where a pass stays in its cache, a GPU where it has enough to do."""
LOGIT_ROWS = 128
"""Log-probabilities are taken for so many positions at a time: a [LOGIT_ROWS, vocabulary] float32 block stays in a CPU's cache."""


def per_token(rewards: Rewards, response: Sequence[int]) -> Rewards:
    """Length-normalised: divided by the number of the response's tokens, the end token included where it counts."""
    return {name: value / len(response) for name, value in rewards.items()}


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
class StackedSet:
    """A policy set ready for scoring: the stack of each module that its adapters change, in the order of PolicySet.folders, on the
    model's device."""

    policy_set: PolicySet
    stacks: dict[str, StackedLora]


class RewardModel:
    """Scores responses under any policy set of the store that was made for this base; the last `keep` sets stay in memory.

    It belongs to one thread at a time, but for `check` and `token_budget`.
    """

    def __init__(self, model: Any, store: PolicyStore, *, base_sha256: str, keep: int = 2, token_budget: int | None = None) -> None:
        """`model`: a plain transformers causal LM in float32, which the RewardModel takes over. `token_budget`: most tokens in one
        pass, all rows together, unless one response alone has more; None: TOKEN_BUDGETS."""
        self.store = store
        self.base_sha256 = base_sha256
        self.keep = keep
        self.token_budget = token_budget or TOKEN_BUDGETS[model.device.type]
        self._resident: OrderedDict[str, StackedSet] = OrderedDict()
        self._model = model.eval().requires_grad_(False)
        self._linears = _wrap_linears(model)
        config = model.config
        self.vocabulary: int = config.vocab_size
        self.context: int = min(
            config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings
        )
        self._check_packing()

    @classmethod
    def load(
        cls,
        folder: Path,
        store: PolicyStore,
        *,
        base_sha256: str,
        device: Literal["auto", "cpu", "cuda"] = "cpu",
        keep: int = 2,
        token_budget: int | None = None,
    ) -> RewardModel:
        """The base in `folder`; auto: on a GPU if there is one."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        return cls(model, store, base_sha256=base_sha256, keep=keep, token_budget=token_budget)

    @property
    def device(self) -> str:
        return str(self._model.device.type)

    def check(self, group: Group) -> None:
        """Raises InvalidRequest for an empty prompt or response, for ids that the model does not have and for more tokens than its
        context."""
        if not group.prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        for index, ids in enumerate(group.responses):
            if not ids:
                raise InvalidRequest(f"response {index} has no tokens: give its text, or at least the end token", param="responses")
            if (tokens := len(group.prompt) + len(ids)) > self.context:
                raise InvalidRequest(
                    f"prompt ({len(group.prompt)} tokens) and response {index} ({len(ids)}) are too long: "
                    f"{tokens} tokens, at most {self.context}",
                    param="responses",
                )
        for param, ids in [("prompt", group.prompt), *(("responses", ids) for ids in group.responses)]:
            if not 0 <= min(ids) <= max(ids) < self.vocabulary:
                raise InvalidRequest(f"token ids must be 0 to {self.vocabulary - 1}", param=param)

    def score(self, policy_set: str, groups: Sequence[Group], soups: Sequence[Weights] = ()) -> list[list[Rewards]]:
        """The rewards of each response of each group under every policy of the set and the soups (exact merges) at `soups`.

        Raises InvalidRequest as `check` does and for wrong soups, NotFound for a set that is not there, IncompatiblePolicy for one
        of another base.
        """
        resident = self._load(policy_set)
        objectives = resident.policy_set.objectives
        soups = [normalize_weights(weights, objectives, param="weights") for weights in soups]
        names = [*objectives, *map(format_weights, soups)]
        for group in groups:
            self.check(group)
        models = [dict.fromkeys(objectives, 0.0), *(one_hot_weights(objective, objectives) for objective in objectives), *soups]
        beneath = [1.0] if resident.policy_set.reference_dir is not None else []  # its adapter is the last one in the stacks
        coefficients = torch.tensor([[*weights.values(), *beneath] for weights in models])  # row 0 is the reference

        beta = resident.policy_set.manifest.beta
        rewards: list[Rewards] = []
        pieces = [piece for group in groups for piece in group.cut(self.token_budget)]
        for row in rows_of(pieces, self.token_budget // len(models)):
            # A group too long for all rows at once goes by fewer rows, not by fewer responses: rows share only the reading of
            # weights, responses share the prompt's forward.
            packing = Packing(row, self._model.device)
            at_once = max(1, self.token_budget // packing.ids.numel())
            log_probs = torch.cat([self._log_probs(resident.stacks, some, packing) for some in torch.split(coefficients, at_once)])
            differences = beta * (log_probs[1:] - log_probs[0])
            rewards += [dict(zip(names, column, strict=True)) for column in differences.T.tolist()]
        left = iter(rewards)
        return [[next(left) for _ in group.responses] for group in groups]

    def _load(self, reference: str) -> StackedSet:
        policy_set = self.store.get(reference)
        if policy_set.id in self._resident:
            self._resident.move_to_end(policy_set.id)
            return self._resident[policy_set.id]
        policy_set.check_base(self.base_sha256)
        policy_set.verify()
        adapters = [load_adapter(folder) for folder in policy_set.folders.values()]
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
        self._resident[policy_set.id] = StackedSet(policy_set, stacks)
        return self._resident[policy_set.id]

    def _mix(self, stacks: Mapping[str, StackedLora], coefficients: Tensor) -> None:
        """From now on batch row j is the base changed by the adapters with coefficients[j]."""
        coefficients = coefficients.to(self._model.device)
        for module, linear in self._linears.items():
            lora = stacks.get(module) if coefficients.any() else None
            linear.delta = (lora, lora.expand(coefficients).unsqueeze(1)) if lora else None

    @torch.inference_mode()
    def _log_probs(self, stacks: Mapping[str, StackedLora], coefficients: Tensor, packing: Packing) -> Tensor:
        """log pi(y|x) summed over each response's tokens under each row of coefficients [rows, adapters]: [rows, responses],
        float64 sums of float32 values, on the CPU."""
        rows = len(coefficients)
        self._mix(stacks, coefficients)
        hidden = self._model.base_model(
            input_ids=packing.ids.expand(rows, -1),
            position_ids=packing.positions.expand(rows, -1),
            use_cache=False,
            packing=packing,
        ).last_hidden_state
        flat = hidden[:, packing.predictors].flatten(0, 1)
        wanted = packing.targets.repeat(rows)
        head = self._model.get_output_embeddings()
        # Into one tensor: small results kept from block to block would lie in the holes that large logits leave on the heap, and
        # the next ones would not fit there any more.
        losses = torch.empty(len(flat), device=flat.device)
        for into, some, targets in zip(*(torch.split(whole, LOGIT_ROWS) for whole in (losses, flat, wanted)), strict=True):
            into.copy_(F.cross_entropy(head(some), targets, reduction="none"))
        table = -losses.view(rows, -1).double()
        return torch.stack([table[:, start:stop].sum(dim=1) for start, stop in packing.responses], dim=1).cpu()

    @torch.inference_mode()
    def _check_packing(self) -> None:
        """Refuses a base that packing does not compute as it computes itself (soft-capped logits, scaled outputs, …)."""
        groups = [Group([1, 2, 3], [[4, 5, 6, 7], [5, 4]]), Group([2, 1], [[7, 6, 5]])]
        self._model.set_attn_implementation("sdpa")
        wanted = []
        for prompt, ids in [(list(group.prompt), list(ids)) for group in groups for ids in group.responses]:
            logits = self._model(input_ids=torch.tensor([prompt + ids], device=self._model.device)).logits[0, len(prompt) - 1 : -1]
            wanted.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
        self._model.set_attn_implementation("sipo_packed")
        found = self._log_probs({}, torch.zeros(1, 0), Packing(groups, self._model.device))[0].tolist()
        if max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > 1e-3:
            raise InvalidRequest(
                f"{type(self._model).__name__} cannot be scored: its attention or its outputs are not the usual ones"
            )


def _wrap_linears(model: nn.Module) -> dict[str, StackedLinear]:
    """Puts a StackedLinear around every layer that an adapter may change; by the layer's name in the plain model."""
    linears = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ADAPTABLE_MODULES:
            linears[name] = StackedLinear(module)
            model.set_submodule(name, linears[name])
    return linears
