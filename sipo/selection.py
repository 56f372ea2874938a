"""Which of a prompt's candidates makes its Pareto pairs (Eq. 7): better than both originals on every reward, the best of those.

Pure functions over plain data; where the rewards come from is sipo.rewards' business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Rule = Literal["truncated", "empty", "duplicate", "not_finite", "worse_than_original", "not_best"]


@dataclass(frozen=True)
class Rejection:
    """Why a candidate was not chosen.

    >>> str(Rejection("duplicate", "of response_0"))
    'duplicate: of response_0'
    """

    rule: Rule
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}" if self.detail else self.rule


@dataclass(frozen=True)
class Response:
    """A candidate as far as screening sees it. `truncated`: it was cut off, its end is not its own."""

    text: str
    truncated: bool = False


@dataclass(frozen=True)
class Selection:
    """`chosen` indexes the candidates, None if none is good enough; `rejections[j]` is None for the chosen one alone."""

    chosen: int | None
    rejections: list[Rejection | None]


@dataclass(frozen=True)
class Pair:
    """A training pair of D^c, in TRL's column names."""

    prompt: str
    chosen: str
    rejected: str


def screen(originals: Sequence[str], candidates: Sequence[Response]) -> list[Rejection | None]:
    """What needs no rewards to be rejected: truncated, empty, or the same text as an original or as an earlier candidate.

    A truncated candidate does not make a later one a duplicate.
    """
    seen = {text.strip(): f"of response_{index}" for index, text in reversed(list(enumerate(originals)))}
    rejections: list[Rejection | None] = []
    for index, candidate in enumerate(candidates):
        text = candidate.text.strip()
        if candidate.truncated:
            rejections.append(Rejection("truncated"))
        elif not text:
            rejections.append(Rejection("empty"))
        elif text in seen:
            rejections.append(Rejection("duplicate", seen[text]))
        else:
            rejections.append(None)
            seen[text] = f"of candidate {index}"
    return rejections


def select(
    originals: tuple[Mapping[str, float], Mapping[str, float]], candidates: Sequence[Mapping[str, float] | Rejection]
) -> Selection:
    """Eq. 7: among the candidates whose every reward is strictly above that of both originals, the one with the largest average.

    `originals`: the rewards of y_-1 and y_1, by name; a candidate is its rewards under the same names, or the Rejection that it
    already has. Of equally good candidates the first is chosen. Raises ValueError for a reward of an original that is not finite:
    then nothing can be compared.
    """
    for index, rewards in enumerate(originals):
        if name := _not_finite(rewards):
            raise ValueError(f"the reward {name!r} of response_{index} is {rewards[name]}: no candidate can be compared with it")
    rejections = [one if isinstance(one, Rejection) else _compare(one, originals) for one in candidates]
    averages = {index: _average(rewards) for index, rewards in enumerate(candidates) if not isinstance(rewards, Rejection)}
    good = [index for index, rejection in enumerate(rejections) if rejection is None]
    if not good:
        return Selection(None, rejections)
    chosen = max(good, key=averages.__getitem__)
    for index in good:
        if index != chosen:
            detail = f"average {averages[index]:.4f}, candidate {chosen} has {averages[chosen]:.4f}"
            rejections[index] = Rejection("not_best", detail)
    return Selection(chosen, rejections)


def pareto_pairs(prompt: str, chosen: str, originals: tuple[str, str]) -> list[Pair]:
    """D^c of one accepted prompt: y_c ≻ y_-1 and y_c ≻ y_1 (one pair where the originals are the same text)."""
    return [Pair(prompt, chosen, original) for original in dict.fromkeys(originals)]


def _compare(rewards: Mapping[str, float], originals: Sequence[Mapping[str, float]]) -> Rejection | None:
    """None if every reward beats both originals, otherwise the reward by which it falls furthest short."""
    if name := _not_finite(rewards):
        return Rejection("not_finite", f"{name} is {rewards[name]}")
    margins = []
    for index, original in enumerate(originals):
        if rewards.keys() != original.keys():
            raise ValueError(f"rewards of different models: {sorted(rewards)} against {sorted(original)} of response_{index}")
        margins += [(rewards[name] - original[name], name, index) for name in rewards]
    margin, name, index = min(margins)
    return None if margin > 0 else Rejection("worse_than_original", f"{name} {margin:+.4f} against response_{index}")


def _not_finite(rewards: Mapping[str, float]) -> str | None:
    return next((name for name, value in rewards.items() if not math.isfinite(value)), None)


def _average(rewards: Mapping[str, float]) -> float:
    return math.fsum(rewards.values()) / len(rewards)
