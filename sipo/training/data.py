"""Preference pairs: made from labelled examples and from accepted responses, and turned into the tokens that TRL trains on.

Knows nothing about models or trainers. Tokens come from the policy set's PromptFormat: training sees what sampling and scoring see.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from sipo.conversation import JsonPrompt, Prompt, as_json, as_prompt
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.selection import pareto_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_SHARE = 0.1
MIN_PAIRS_TO_HOLD_OUT = 40


class TrainingPair(TypedDict):
    """One preference pair under TRL's column names, in plain JSON."""

    prompt: JsonPrompt
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
            yield TrainingPair(prompt=as_json(example.prompt), chosen=chosen, rejected=rejected)


Design = Literal["both", "preferred", "preferred_and_original", "original", "dispreferred"]
"""Which preferences a round's policies learn, with y_w and y_l the preferred and the dispreferred original of an objective.

both (section 3.3): y_c ≻ y_-1 and y_c ≻ y_1; of Figure 8: preferred y_c ≻ y_w, preferred_and_original y_c ≻ y_w and y_w ≻ y_l,
original y_w ≻ y_l; and dispreferred y_c ≻ y_l.
"""


@dataclass(frozen=True)
class ChosenResponse:
    """y_c, for every policy or for that of `objective` alone. `token_ids`: as it was sampled, empty if made elsewhere."""

    text: str
    token_ids: list[int]
    objective: str | None = None


def pareto_rows(
    example: Example, chosen: Sequence[ChosenResponse], objective: str | None = None, design: Design = "both"
) -> list[TrainingPair]:
    """A prompt's pairs for the policy of `objective`, or those of D^c for all policies.

    Where the objective has no label here, y_w and y_l are not known: y_c is paired with both originals, and there is no y_w ≻ y_l.
    Responses chosen for one objective alone have one pair, y_c ≻ y_w, in any design.
    """
    labelled = objective is not None and objective in example.labels
    winner, loser = example.chosen_rejected(objective) if labelled and objective is not None else ("", "")
    opponents = {"preferred": winner, "preferred_and_original": winner, "dispreferred": loser}.get(design) if labelled else None
    rows = []
    for one in chosen if design != "original" else []:
        if objective is not None and one.objective not in (None, objective):
            continue
        for pair in pareto_pairs(example, one.text, one.objective):
            if one.objective is None and opponents is not None and pair.rejected != opponents:
                continue
            row = TrainingPair(prompt=as_json(pair.prompt), chosen=pair.chosen, rejected=pair.rejected)
            rows.append(TrainingPair(**row, chosen_token_ids=one.token_ids) if one.token_ids else row)
    if chosen and labelled and design in ("preferred_and_original", "original"):
        rows.append(TrainingPair(prompt=as_json(example.prompt), chosen=winner, rejected=loser))
    return rows


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
    by_prompt: dict[Prompt, list[TokenPair]] = {}
    drawn = 0
    for prompt, pair in _shuffled_by_prompt(source, seed):
        if drawn == max_pairs:
            break
        prompt_ids = prompt_format.prompt_ids(prompt, tokenizer)
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
        by_prompt.setdefault(prompt, []).append(row)
        drawn += 1

    train: list[TokenPair] = []
    validation: list[TokenPair] = []
    wanted = VALIDATION_SHARE * drawn if drawn >= MIN_PAIRS_TO_HOLD_OUT else 0
    groups = list(by_prompt.values())
    for index, group in enumerate(groups):
        last = index == len(groups) - 1
        (validation if len(validation) < wanted and not last else train).extend(group)
    return TokenisedPairs(train, validation or train, held_out=bool(validation), left_out=counts)


def _shuffled_by_prompt(source: Sequence[TrainingPair], seed: int) -> Iterator[tuple[Prompt, TrainingPair]]:
    groups: dict[Prompt, list[TrainingPair]] = {}
    for pair in source:
        groups.setdefault(as_prompt(pair["prompt"]), []).append(pair)
    order = list(groups.items())
    random.Random(seed).shuffle(order)
    for prompt, group in order:
        for pair in group:
            yield prompt, pair
