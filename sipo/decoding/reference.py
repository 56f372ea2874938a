"""The exact reference decoder: one forward pass per policy and token, log-softmax, mix, pick. No batching and no engine; what the
engine in sipo.decoding.vllm computes is tested against this, token for token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from sipo.decoding.mixing import reverse_kl
from sipo.preferences import normalize_weights


class ReferenceDecoder:
    """A base model in float32 with one PEFT adapter per objective."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        self.objectives = tuple(adapters)
        (first, folder), *others = adapters.items()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
        for name, other in others:
            self.model.load_adapter(str(other), adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        weights: Mapping[str, float],
        *,
        max_tokens: int,
        end_token_ids: Sequence[int] = (),
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """The response's token ids, the end token included if one was reached. Temperature 0 is greedy, else samples are drawn from
        the mixture with its log-probabilities divided by the temperature."""
        w = torch.tensor(list(normalize_weights(weights, self.objectives).values()))
        caches = {name: DynamicCache() for name in self.objectives}
        response: list[int] = []
        step = torch.tensor([list(prompt_ids)])
        while len(response) < max_tokens:
            log_probs = torch.stack([self._next_log_probs(name, step, caches[name]) for name in self.objectives])
            mixed = reverse_kl(log_probs, w)
            if temperature == 0:
                token = int(mixed.argmax())
            else:
                token = int(torch.multinomial(torch.softmax(mixed / temperature, dim=-1), 1, generator=generator))
            response.append(token)
            if token in end_token_ids:
                break
            step = torch.tensor([[token]])
        return response

    def _next_log_probs(self, objective: str, step: Tensor, cache: DynamicCache) -> Tensor:
        """log pi_i(. | x, y_<t) [vocabulary]; `step` holds the tokens that the policy's cache has not seen."""
        self.model.set_adapter(objective)
        return torch.log_softmax(self.model(input_ids=step, past_key_values=cache).logits[0, -1], dim=-1)
