"""How much the objectives of a data set disagree (paper section 2), and subsets with a chosen amount of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from sipo.errors import InvalidRequest
from sipo.preferences import Example


@dataclass(frozen=True)
class PairConflict:
    """Two objectives: on `conflicting` of the `rows` that both label they prefer different responses."""

    first: str
    second: str
    rows: int
    conflicting: int

    @property
    def ratio(self) -> float:
        return _ratio(self.conflicting, self.rows)


@dataclass(frozen=True)
class ConflictReport:
    """`comparable` rows have two labels or more; of those, `conflicting` ones have labels that are not all equal.

    `labels` counts the labelled rows of each objective. `pairs` has every two objectives, in the order of their first labels.
    """

    rows: int
    labels: dict[str, int]
    comparable: int
    conflicting: int
    pairs: list[PairConflict]

    @property
    def ratio(self) -> float:
        """Of the comparable rows; 0 if there are none."""
        return _ratio(self.conflicting, self.comparable)


def conflict_report(examples: Sequence[Example]) -> ConflictReport:
    labels = Counter(name for example in examples for name in example.labels)
    return ConflictReport(
        rows=len(examples),
        labels=dict(labels),
        comparable=sum(len(example.labels) > 1 for example in examples),
        conflicting=sum(example.conflicting() for example in examples),
        pairs=[_pair_conflict(examples, first, second) for first, second in combinations(labels, 2)],
    )


def subset(
    examples: Sequence[Example], conflict_ratio: float, size: int, seed: int = 0, *, distinct_prompts: bool = False
) -> list[Example]:
    """`size` of the comparable examples, drawn by seed, of which the share `conflict_ratio` conflicts; in their original order.
    `distinct_prompts`: no two of one prompt.

    Raises InvalidRequest if there are not enough of either kind.
    """
    if not 0 <= conflict_ratio <= 1:
        raise InvalidRequest(f"the conflict ratio is {conflict_ratio}: it must be from 0 to 1", param="conflict_ratio")
    if size < 1:
        raise InvalidRequest(f"the size is {size}: it must be 1 or more", param="size")
    draw = random.Random(seed)
    conflicting = [row for row, example in enumerate(examples) if example.conflicting()]
    agreeing = [row for row, example in enumerate(examples) if len(example.labels) > 1 and not example.conflicting()]
    if distinct_prompts:
        conflicting, agreeing = _one_of_each_prompt(examples, [conflicting, agreeing], draw)
    wanted = round(conflict_ratio * size)
    if wanted > len(conflicting) or size - wanted > len(agreeing):
        raise InvalidRequest(
            f"{size} rows at a conflict ratio of {conflict_ratio:g} need {wanted} conflicting and {size - wanted} other rows: "
            f"there are {len(conflicting)} and {len(agreeing)}",
            param="size",
        )
    rows = draw.sample(conflicting, wanted) + draw.sample(agreeing, size - wanted)
    return [examples[row] for row in sorted(rows)]


def _one_of_each_prompt(examples: Sequence[Example], kinds: Iterable[Sequence[int]], draw: random.Random) -> list[list[int]]:
    """Of the rows of each kind those that are left if every prompt, of whichever kind, keeps one row."""
    rows = [(row, kind) for kind, of_kind in enumerate(kinds) for row in of_kind]
    draw.shuffle(rows)
    kept = {examples[row].prompt: (row, kind) for row, kind in rows}
    return [[row for row, of in kept.values() if of == kind] for kind, _ in enumerate(kinds)]


def _pair_conflict(examples: Sequence[Example], first: str, second: str) -> PairConflict:
    both = [example for example in examples if first in example.labels and second in example.labels]
    return PairConflict(first, second, len(both), sum(example.conflicting([first, second]) for example in both))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
