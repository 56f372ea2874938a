"""A preference pair in one forward: its prompt once, then both responses.

DPO's two rows, prompt + chosen and prompt + rejected, begin alike, and only their responses are scored. Laid out as one row

    p_1 … p_{P-1} | p_P c_1 … c_{m-1} | p_P r_1 … r_{n-1}

with attention that lets each response see the prompt and itself, P + m + n tokens do the work of 2P + m + n, and the language-model
head sees those m + n alone whose next token counts. What comes out is the same up to rounding, gradients too.
"""

from __future__ import annotations

import dataclasses
from functools import wraps
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclasses.dataclass(frozen=True)
class PairLayout:
    """Where a pair lies in one row: `prefix` tokens of prompt, then a block for each response, as long as the response."""

    prefix: int
    lengths: tuple[int, int]

    @classmethod
    def of(cls, input_ids: Tensor, labels: Tensor) -> PairLayout | None:
        """Of TRL's rows [2, L], padded on the right; None if they are not one pair with one prompt."""
        if len(input_ids) != 2:
            return None
        scored = labels != IGNORED
        begins = scored.int().argmax(dim=1)
        prompt = int(begins[0])
        if prompt == 0 or begins[1] != prompt or not torch.equal(*input_ids[:, :prompt]):
            return None
        chosen, rejected = scored.sum(dim=1).tolist()
        return cls(prompt - 1, (chosen, rejected))

    @property
    def blocks(self) -> list[slice]:
        """Of the two responses, counted from the end of the prefix."""
        chosen, rejected = self.lengths
        return [slice(0, chosen), slice(chosen, chosen + rejected)]

    def pack(self, rows: Tensor, shift: int) -> Tensor:
        """[2, L] to [m + n]: what stands at each response's predicting positions (shift 0), or at those they predict (shift 1)."""
        start = self.prefix + shift
        return torch.cat([row[start : start + length] for row, length in zip(rows, self.lengths, strict=True)])

    def unpack(self, values: Tensor, width: int) -> Tensor:
        """[1, m + n] to [2, width], zero where nothing is predicted: the inverse of `pack` with shift 0."""
        rows = values.new_zeros(2, width)
        for row, block in enumerate(self.blocks):
            rows[row, self.prefix : self.prefix + self.lengths[row]] = values[0, block]
        return rows

    def positions(self, device: torch.device) -> Tensor:
        steps = [torch.arange(self.prefix, self.prefix + length, device=device) for length in self.lengths]
        return torch.cat([torch.arange(self.prefix, device=device), *steps])[None]

    def attention_mask(self, device: torch.device) -> Tensor:
        """[1, 1, T, T], True = visible: the lower triangle, but the second response does not see the first."""
        tokens = self.prefix + sum(self.lengths)
        visible = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        second = self.prefix + self.lengths[0]
        visible[second:, self.prefix : second] = False
        return visible[None, None]


def share_prompts(model: Any) -> None:
    """From now on `model`, a causal LM that has TRL's fused head, computes a pair's prompt once.

    Other calls go the usual way, and so do models whose attention has windows or takes no such mask.
    """
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) is not None or config._attn_implementation != "sdpa":
        return
    plain = model.forward

    @wraps(plain)
    def forward(input_ids: Tensor, *, labels: Tensor | None = None, fused_lm_head: bool = False, **others: Any) -> Any:
        layout = PairLayout.of(input_ids, labels) if fused_lm_head and labels is not None else None
        if layout is None:
            return plain(input_ids=input_ids, labels=labels, fused_lm_head=fused_lm_head, **others)
        assert labels is not None
        others.pop("attention_mask", None)  # of the padding, which is not laid out

        def drop_prefix(_trunk: Any, _args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, layout.prefix :]
            return output

        hook = model.base_model.register_forward_hook(drop_prefix)
        try:
            found = plain(
                input_ids=torch.cat([input_ids[0, : layout.prefix], layout.pack(input_ids, 0)])[None],
                position_ids=layout.positions(input_ids.device),
                attention_mask=layout.attention_mask(input_ids.device),
                shift_labels=layout.pack(labels, 1)[None],
                fused_lm_head=True,
                **others,
            )
        finally:
            hook.remove()
        width = labels.shape[1] - 1
        unpacked = {name: layout.unpack(values, width) for name in PER_TOKEN if (values := found.get(name)) is not None}
        return dataclasses.replace(found, label_mask=labels[:, 1:] != IGNORED, **unpacked)

    model.forward = forward
