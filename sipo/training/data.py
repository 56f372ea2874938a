"""Preference pairs: made from labelled examples and from accepted responses, and turned into the tokens that TRL trains on.

Knows nothing about models or trainers. Tokens come from the policy set's PromptFormat: training sees what sampling and scoring see.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NotRequired, TypedDict

from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.selection import pareto_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 0.1
MIN_PAIRS_TO_HOLD_OUT = 40


class TrainingPair(TypedDict):
    """One preference pair under TRL's column names."""

    prompt: str
    chosen: str
    rejected: str
    chosen_token_ids: NotRequired[list[int]]
    """The chosen response as it was sampled: its text may have another tokenisation."""
    opposing_weight: NotRequired[float]
    """1 − W of DPO LW: the weights of the objectives that prefer the rejected response."""


class TokenPair(TypedDict):
    """A pair as TRL's collator takes it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    opposing_weight: float


def alignment_pairs(examples: Iterable[Example], objective: str) -> Iterator[TrainingPair]:
    """D_i (Eq. 2): the examples that carry objective i, each oriented by its own label."""
    for example in examples:
        if objective in example.labels:
            chosen, rejected = example.chosen_rejected(objective)
            yield TrainingPair(prompt=example.prompt, chosen=chosen, rejected=rejected)


def pareto_rows(example: Example, text: str, token_ids: list[int], objective: str | None = None) -> list[TrainingPair]:
    """D^c of one chosen response: for every policy, or for that of the one objective that it was chosen for."""
    rows = [
        TrainingPair(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected)
        for pair in pareto_pairs(example, text, objective)
    ]
    return [TrainingPair(**row, chosen_token_ids=token_ids) for row in rows] if token_ids else rows


@dataclass
class TokenisedPairs:
    train: list[TokenPair]
    validation: list[TokenPair]
    held_out: bool
    left_out: Counter[str] = field(default_factory=Counter)


def tokenise(
    source: Sequence[TrainingPair],
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    max_pairs: int | None,
    seed: int,
) -> TokenisedPairs:
    """Draws up to `max_pairs` usable pairs by seed and splits off the validation pairs; `left_out` counts what was met on the way
    ("prompts_too_long", "identical": left out; "responses_cut": cut, without an end token).

    Pairs of one prompt stay on one side of the split: they share the chosen response.
    """
    counts: Counter[str] = Counter()
    by_prompt: dict[str, list[TokenPair]] = {}
    drawn = 0
    for pair in _shuffled_by_prompt(source, seed):
        if drawn == max_pairs:
            break
        prompt_ids = prompt_format.prompt_ids(pair["prompt"], tokenizer)
        if len(prompt_ids) > max_prompt_tokens:
            counts["prompts_too_long"] += 1
            continue
        chosen_ids = pair.get("chosen_token_ids") or prompt_format.response_ids(pair["chosen"], tokenizer)
        rejected_ids = prompt_format.response_ids(pair["rejected"], tokenizer)
        counts["responses_cut"] += sum(len(ids) > max_response_tokens for ids in (chosen_ids, rejected_ids))
        chosen_ids, rejected_ids = chosen_ids[:max_response_tokens], rejected_ids[:max_response_tokens]
        if chosen_ids == rejected_ids:
            counts["identical"] += 1
            continue
        row = TokenPair(
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            opposing_weight=pair.get("opposing_weight", 0.0),
        )
        by_prompt.setdefault(pair["prompt"], []).append(row)
        drawn += 1

    train: list[TokenPair] = []
    validation: list[TokenPair] = []
    wanted = HELD_OUT * drawn if drawn >= MIN_PAIRS_TO_HOLD_OUT else 0
    groups = list(by_prompt.values())
    for index, group in enumerate(groups):
        last = index == len(groups) - 1
        (validation if len(validation) < wanted and not last else train).extend(group)
    return TokenisedPairs(train, validation or train, held_out=bool(validation), left_out=counts)


def _shuffled_by_prompt(source: Sequence[TrainingPair], seed: int) -> Iterator[TrainingPair]:
    groups: dict[str, list[TrainingPair]] = {}
    for pair in source:
        groups.setdefault(pair["prompt"], []).append(pair)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    for group in order:
        yield from group
