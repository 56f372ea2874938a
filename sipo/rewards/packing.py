"""Prompts and their responses laid end to end in one row, and the attention that keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """A prompt and responses to it, as token ids. Every id of a response counts: it ends with the end token if and only if it ended
    by itself."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    def cut(self, longest: int) -> Iterator[Group]:
        """Its responses in order, as many at a time as `longest` tokens hold beside the prompt, at least one."""
        start, tokens = 0, len(self.prompt)
        for index, ids in enumerate(self.responses):
            tokens += len(ids)
            if tokens > longest and index > start:
                yield Group(self.prompt, self.responses[start:index])
                start, tokens = index, len(self.prompt) + len(ids)
        if start < len(self.responses):
            yield Group(self.prompt, self.responses[start:])


def rows_of(groups: Sequence[Group], length: int) -> Iterator[list[Group]]:
    """Groups in order, as many to a row as `length` tokens hold, at least one."""
    row: list[Group] = []
    tokens = 0
    for group in groups:
        if row and tokens + group.tokens > length:
            yield row
            row, tokens = [], 0
        row.append(group)
        tokens += group.tokens
    if row:
        yield row


@dataclass(frozen=True)
class Section:
    """Where a prompt lies in a row, and its responses; `masks[j]` is added to the scores of response j [its length, prompt and
    itself]: 0 = visible, −inf = not."""

    prompt: Bounds
    responses: list[Bounds]
    masks: list[Tensor]


class Packing:
    """A row of groups, as model inputs and outputs. The last token of a response is predicted, never read, so it is not in the row.

    `ids` and `positions`: the row. `targets`: all response tokens, end to end; `predictors`: the place in the row that predicts
    each; `responses`: the bounds of each response in the targets.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        ids: list[int] = []
        positions: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        self.sections: list[Section] = []
        for group in groups:
            begin, length = len(ids), len(group.prompt)
            starts = [begin + length, *(len(answer) - 1 for answer in group.responses)]
            responses = list(pairwise(accumulate(starts)))
            ids += [*group.prompt, *(token for answer in group.responses for token in answer[:-1])]
            positions += [*range(length), *(length + step for start, stop in responses for step in range(stop - start))]
            # A response's first token is predicted at the prompt's last position, the others at the token before them.
            predictors += [place for start, stop in responses for place in (begin + length - 1, *range(start, stop))]
            targets += [token for answer in group.responses for token in answer]
            masks = [_mask(length, stop - start, device) for start, stop in responses]
            self.sections.append(Section((begin, begin + length), responses, masks))
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor([positions], device=device)
        self.predictors = torch.tensor(predictors, device=device)
        self.targets = torch.tensor(targets, device=device)
        lengths = (len(answer) for group in groups for answer in group.responses)
        self.responses: list[Bounds] = list(pairwise(accumulate(lengths, initial=0)))


def _mask(prompt: int, response: int, device: torch.device) -> Tensor:
    hidden = torch.full((response, prompt + response), float("-inf"), device=device)
    return hidden.triu(prompt + 1)


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
    """Attention in transformers' form over [rows, heads, length, d]: a prompt sees itself, a response its prompt and itself."""
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    rows, heads, length, width = query.shape
    out = query.new_empty(rows, length, heads, width)
    for section in packing.sections:
        begin, end = section.prompt
        prompt_keys, prompt_values = key[:, :, begin:end], value[:, :, begin:end]
        out[:, begin:end] = attend(query[:, :, begin:end], prompt_keys, prompt_values, is_causal=True).transpose(1, 2)
        for (start, stop), mask in zip(section.responses, section.masks, strict=True):
            keys = torch.cat([prompt_keys, key[:, :, start:stop]], dim=2)
            values = torch.cat([prompt_values, value[:, :, start:stop]], dim=2)
            out[:, start:stop] = attend(query[:, :, start:stop], keys, values, attn_mask=mask).transpose(1, 2)
    return out, None


AttentionInterface.register("sipo_packed", packed_attention)
