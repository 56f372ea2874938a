"""The exact reference decoder: one forward pass per policy and token, log-softmax, mix, pick. No batching and no engine; what the
engine in sipo.decoding.vllm computes is tested against this, token for token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from sipo.decoding.mixing import mix
from sipo.decoding.request import LINEAR, REVERSE_KL, MixingRule
from sipo.lora import load_adapter, merge
from sipo.preferences import BASE, REFERENCE, normalize_weights


class ReferenceDecoder:
    """A base model in float32 with one PEFT adapter per objective, on top of that of `reference` where there is one."""

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path],
        *,
        reference: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.objectives = tuple(adapters)
        self._base, self._reference = base, reference
        (first, folder), *others = adapters.items()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if reference is not None:
            merge(model, load_adapter(reference))
        self.model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
        for name, other in others:
            self.model.load_adapter(str(other), adapter_name=name)
        self.model.eval().to(device)

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        weights: Mapping[str, float],
        *,
        max_tokens: int,
        rule: MixingRule = REVERSE_KL,
        alpha: float | None = None,
        end_token_ids: Sequence[int] = (),
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """The response's token ids, the end token included if one was reached. Temperature 0 is greedy, else samples are drawn from
        the mixture with its log-probabilities divided by the temperature.

        With the rule "linear", `weights` are free coefficients of any objectives, "reference" and "base".
        """
        step = self._steps(weights, rule, alpha)
        response: list[int] = []
        unseen = list(prompt_ids)
        while len(response) < max_tokens:
            log_probs = step(unseen)
            if temperature == 0:
                token = int(log_probs.argmax())
            else:
                token = int(torch.multinomial(torch.softmax(log_probs / temperature, dim=-1), 1, generator=generator))
            response.append(token)
            if token in end_token_ids:
                break
            unseen = [token]
        return response

    @torch.inference_mode()
    def next_log_probs(
        self, token_ids: Sequence[int], weights: Mapping[str, float], rule: MixingRule = REVERSE_KL, alpha: float | None = None
    ) -> Tensor:
        """The mixture's log-probabilities [vocabulary] of the token after these."""
        return self._steps(weights, rule, alpha)(token_ids)

    def _steps(self, weights: Mapping[str, float], rule: MixingRule, alpha: float | None) -> Callable[[Sequence[int]], Tensor]:
        """A function from the tokens that it has not seen yet to the mixture's log-probabilities [vocabulary] after them."""
        w = dict(weights) if rule == LINEAR else normalize_weights(weights, self.objectives)
        if rule == "jensen_shannon":
            w = {REFERENCE: 0.0, **w}
        caches = {name: DynamicCache() for name in w}

        def step(unseen: Sequence[int]) -> Tensor:
            ids = torch.tensor([list(unseen)], device=self.model.device)
            log_probs = torch.stack([self._next_log_probs(name, ids, cache) for name, cache in caches.items()])
            return mix(rule, log_probs, torch.tensor(list(w.values()), device=ids.device), alpha)

        return step

    def _next_log_probs(self, name: str, unseen: Tensor, cache: DynamicCache) -> Tensor:
        """log pi(. | x, y_<t) [vocabulary] of an objective's policy, the reference or the base; `cache` has what precedes `unseen`
        [1, tokens]."""
        model = self._plain if name == BASE else self.model
        if name in (BASE, REFERENCE):
            adapter = self.model.disable_adapter()
        else:
            adapter = nullcontext()
            self.model.set_adapter(name)
        with adapter:
            return torch.log_softmax(model(input_ids=unseen, past_key_values=cache).logits[0, -1], dim=-1)

    @cached_property
    def _plain(self) -> Any:
        """The base without any adapter. With a reference in the weights it is another model, loaded when it is first asked for: to
        take the reference out again would leave its rounding in them."""
        if self._reference is None:
            return self.model
        return AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval().to(self.model.device)
