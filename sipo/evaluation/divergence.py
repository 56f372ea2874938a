"""How far a method's policy at each weight has moved from its reference: KL(pi_w || pi_ref), mean per token, in nats, along the
policy's own greedy answers. From the full distributions, so exact but for the answers, which are tokenised again from their text.

One model is in memory, with a copy of the weights that adapters change: each policy is merged into it in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sipo.errors import InvalidRequest
from sipo.evaluation.answers import Answer, Tell
from sipo.evaluation.folder import DIVERGENCES, EvaluationFolder, RowFile
from sipo.evaluation.methods import Method
from sipo.evaluation.plan import Plan
from sipo.preferences import format_weights
from sipo.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from sipo.lora import LoraAdapter

PROMPTS = 32
"""The first ones, whose answers are looked at."""
CHUNK = 8
"""Prompts for which every policy is merged once, and whose rows are written together."""
BLOCK = 64
"""Positions whose distributions are in memory at once: [policies, BLOCK, vocabulary]."""


class Divergence(Record):
    """Of the answers to one prompt, in the order of the method's points that count."""

    prompt: int
    nats: list[float]


def diverge(
    plan: Plan, ids: Mapping[str, list[list[int]]], answers: Mapping[str, Sequence[Answer]], folder: EvaluationFolder, tell: Tell
) -> dict[str, list[list[float]]]:
    """By method that has policies: of each prompt, the divergence at each point. `ids` are those of prompt_ids; the folder may have
    the first rows."""
    found = {}
    for method in plan.methods:
        if not method.adapters:
            continue
        stage, prompts = f"divergence of {method.name}", min(PROMPTS, len(plan.prompts))
        rows = folder.rows(DIVERGENCES, method.name, Divergence)
        done = _begun(rows, prompts, plan.seen(method))
        if len(done) < prompts:
            tell(stage, len(done), prompts)
            with folder.timed(stage):
                policies = Policies(method)
        while len(done) < prompts:
            chunk = range(len(done), min(len(done) + CHUNK, prompts))
            with folder.timed(stage):
                nats = policies.diverge(_texts(plan, method, ids[method.name], answers[method.name], chunk))
            new = [Divergence(prompt=index, nats=row) for index, row in zip(chunk, nats, strict=True)]
            rows.add(new)
            done += new
            tell(stage, len(done), prompts)
        found[method.name] = [row.nats for row in done]
    return found


def _begun(rows: RowFile[Divergence], prompts: int, points: int) -> list[Divergence]:
    done = rows.read()
    if len(done) > prompts or any((row.prompt, len(row.nats)) != (index, points) for index, row in enumerate(done)):
        raise InvalidRequest(f"{rows.path} holds other divergences: remove it, and it is made again", param="out")
    rows.keep(done)
    return done


Text = tuple[Sequence[int], int]
"""Tokens of a prompt and its answer, and how many of them are the prompt's."""


def _texts(
    plan: Plan, method: Method, ids: Sequence[Sequence[int]], answers: Sequence[Answer], prompts: Sequence[int]
) -> list[list[Text]]:
    """By prompt and point."""

    def text(index: int, point: int) -> Text:
        answer = answers[index * len(method.points) + point]
        ended = answer.finish_reason == "stop"
        response = method.prompt_format.response_ids(answer.text, method.base.tokenizer, ended=ended)
        return [*ids[index], *response], len(ids[index])

    return [[text(index, point) for point in range(plan.seen(method))] for index in prompts]


class Policies:
    """A method's policies over its base, in float32, on a GPU if there is one."""

    def __init__(self, method: Method) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from sipo.lora import load_adapter, merge

        self.method = method
        self.adapters = {name: load_adapter(adapter.folder) for name, adapter in method.adapters.items()}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = AutoModelForCausalLM.from_pretrained(method.base.folder, dtype=torch.float32).eval().to(device)
        if method.reference is not None:
            merge(self.model, load_adapter(method.reference.folder))

    def diverge(self, texts: Sequence[Sequence[Text]]) -> list[list[float]]:
        """Of texts [prompts, points]."""
        import torch

        points = list(self.method.points[: len(texts[0])])
        with torch.inference_mode():
            reference = self._hidden(texts)
            if self.method.kind == "mod":
                mixed = [self._hidden(texts, adapter) for adapter in self.adapters.values()]
                of_point = [[hidden[point] for hidden in mixed] for point in range(len(points))]
                weights = [[(weights or {})[name] for name in self.adapters] for weights in points]
            else:
                of_point = [
                    [self._hidden([[of_prompt[point]] for of_prompt in texts], self._adapter(point))[0]]
                    for point in range(len(points))
                ]
                weights = [[1.0]] * len(points)
            return [
                [
                    self._nats([hidden[prompt] for hidden in of_point[point]], weights[point], reference[point][prompt])
                    for point in range(len(points))
                ]
                for prompt in range(len(texts))
            ]

    def _adapter(self, point: int) -> LoraAdapter:
        """The one model that answers at this point."""
        from sipo.soups import exact_soup

        weights = self.method.points[point]
        assert weights is not None, "methods with adapters know weights"
        return self.adapters[format_weights(weights)] if self.method.kind == "models" else exact_soup(self.adapters, weights)

    def _hidden(self, texts: Sequence[Sequence[Text]], adapter: LoraAdapter | None = None) -> list[list[Tensor]]:
        """Final hidden states, by point and prompt of `texts` [prompts, points]: [answer's tokens, hidden], where each of them is
        predicted. An answer without tokens has its first one, that never came."""
        with _merged(self.model, adapter):
            by_prompt = [[self._of_text(*text) for text in of_prompt] for of_prompt in texts]
        return [list(of_point) for of_point in zip(*by_prompt, strict=True)]

    def _of_text(self, ids: Sequence[int], prompt: int) -> Tensor:
        import torch

        inputs = torch.tensor([ids[: max(len(ids) - 1, prompt)]], device=self.model.device)
        hidden: Tensor = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0, prompt - 1 :]
        return hidden

    def _nats(self, policies: Sequence[Tensor], weights: Sequence[float], reference: Tensor) -> float:
        """Mean over the positions; policies are mixed as MOD does. Adapters change no unembedding, so all have the base's."""
        import torch

        from sipo.decoding.mixing import mix
        from sipo.decoding.request import REVERSE_KL

        head = self.model.get_output_embeddings()
        total = 0.0
        for start in range(0, len(reference), BLOCK):
            block = slice(start, start + BLOCK)
            log_ref = torch.log_softmax(head(reference[block]), dim=-1)
            log_probs = torch.stack([torch.log_softmax(head(hidden[block]), dim=-1) for hidden in policies], dim=-2)
            mixed = mix(REVERSE_KL, log_probs, torch.tensor(weights, device=log_probs.device))
            total += float((mixed.exp() * (mixed - log_ref)).sum(dtype=torch.float64))
        return max(0.0, total / len(reference))  # which rounding may bring just below 0


@contextmanager
def _merged(model: Any, adapter: LoraAdapter | None) -> Iterator[None]:
    """The model changed by the adapter; afterwards it has its own weights again, bit by bit."""
    from sipo.lora import merge

    if adapter is None:
        yield
        return
    weights = [model.get_submodule(module).weight for module in adapter.modules]
    own = [weight.detach().clone() for weight in weights]
    merge(model, adapter)
    try:
        yield
    finally:
        for weight, before in zip(weights, own, strict=True):
            weight.data.copy_(before)
