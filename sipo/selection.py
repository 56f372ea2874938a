"""Which of a prompt's candidates make its Pareto pairs (Eq. 7): those better than both originals on every reward, the best of them.

Pure functions over plain data; where the rewards come from is sipo.rewards' business, and that of reward models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sipo.conversation import Prompt, as_messages
from sipo.preferences import Example, ObjectiveName

RejectionRule = Literal[
    "truncated",
    "empty",
    "duplicate",
    "too_long",
    "not_tokenisable",
    "not_finite",
    "rewritten",
    "not_improved",
    "worse_than_original",
    "not_best",
    "not_drawn",
]
"""Why a candidate was not chosen."""


class Filter(BaseModel):
    """How candidates are chosen. The defaults are the paper's Eq. 7 under r_Π and r_W."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["pareto", "no_filter", "separate_responses"] = Field(
        default="pareto",
        description="pareto: better than both originals on every reward. no_filter (the paper's SIPO − filter): as many as pareto "
        "would choose, drawn by seed. separate_responses (the paper's alternative): for each objective a response that is better "
        "than the preferred original by that objective's own reward, for that policy alone",
    )
    soups: bool = Field(default=True, description="False: rewards of the policies only (r_Π), without those of the soups (r_W)")
    implicit: bool = Field(default=True, description="False: only `reward_models` decide")
    reward_models: list[ObjectiveName] = Field(
        default=[],
        max_length=8,
        description="external reward models of this system (SIPO_REWARD_MODELS) whose scores count as well",
    )
    length_normalized: bool = Field(default=False, description="implicit rewards per token of the response, not summed")
    margin: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="how much better than the originals each reward must be"
    )
    top_k: int = Field(default=1, ge=1, le=16, description="most responses chosen per prompt, the best by average reward")
    keep_rewrite: bool = Field(
        default=False,
        description="the published code's rule before the filter: of a sample and its rewrite only one goes on, the rewrite unless "
        "no policy's reward of it is higher",
    )
    keep_truncated: bool = Field(default=False, description="responses cut off at max_tokens take part, as in the paper")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.implicit and not self.reward_models:
            raise ValueError("without implicit rewards nothing decides: name reward_models")
        if self.rule == "separate_responses" and self.reward_models:
            raise ValueError("separate_responses goes by each objective's own implicit reward: leave reward_models out")
        if len(set(self.reward_models)) < len(self.reward_models):
            raise ValueError("a reward model is named twice")
        return self


Rewards = dict[str, float]
"""Of one response, by model: an objective's name for its policy, format_weights(w) for the soup at w, a reward model's name for its
score."""


@dataclass(frozen=True)
class Rejection:
    """Why a candidate was not chosen.

    >>> str(Rejection("duplicate", "of response_0"))
    'duplicate: of response_0'
    """

    rule: RejectionRule
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}" if self.detail else self.rule


@dataclass(frozen=True)
class CandidateText:
    """A candidate as far as screening sees it. `truncated`: it was cut off, its end is not its own."""

    text: str
    truncated: bool = False


class Chosen(BaseModel):
    """A candidate, by its index, that makes pairs: for every policy, or only for that of `objective`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: int
    objective: str | None = None


@dataclass(frozen=True)
class Selection:
    """`chosen`: the best first; `rejections[j]` is None for the chosen ones alone."""

    chosen: list[Chosen]
    rejections: list[Rejection | None]


@dataclass(frozen=True)
class Pair:
    """A training pair of D^c, in TRL's column names."""

    prompt: Prompt
    chosen: str
    rejected: str

    def columns(self, *, conversational: bool) -> dict[str, Any]:
        """As TRL reads them: texts, or lists of messages, which alone can be a conversation. A data set is all of one kind."""
        if not conversational:
            return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        answers = {"chosen": self.chosen, "rejected": self.rejected}
        answered = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        return {"prompt": as_messages(self.prompt), **answered}


Scored = Mapping[str, float] | Rejection
"""A candidate: its rewards by name, or the Rejection that it already has."""


def screen(
    originals: Sequence[str], candidates: Sequence[CandidateText], *, keep_truncated: bool = False
) -> list[Rejection | None]:
    """What needs no rewards to be rejected: truncated, empty, or the same text as an original or as an earlier candidate.

    A rejected truncated candidate does not make a later one a duplicate.
    """
    seen = {text.strip(): f"of response_{index}" for index, text in reversed(list(enumerate(originals)))}
    rejections: list[Rejection | None] = []
    for index, candidate in enumerate(candidates):
        text = candidate.text.strip()
        if not text:
            rejections.append(Rejection("empty"))
        elif candidate.truncated and not keep_truncated:
            rejections.append(Rejection("truncated"))
        elif text in seen:
            rejections.append(Rejection("duplicate", seen[text]))
        else:
            rejections.append(None)
            seen[text] = f"of candidate {index}"
    return rejections


def keep_rewrites(candidates: Sequence[Scored], rewrites: Mapping[int, int], names: Sequence[str]) -> list[Scored]:
    """The published code's step between rewriting and Eq. 7: a rewrite replaces its sample unless none of its rewards `names` is
    higher; then the sample stays. `rewrites` maps a rewrite's index to its sample's."""
    kept = list(candidates)
    for rewrite, sample in rewrites.items():
        new, old = candidates[rewrite], candidates[sample]
        if isinstance(new, Rejection) or isinstance(old, Rejection):
            continue
        if any(new[name] > old[name] for name in names):
            kept[sample] = Rejection("rewritten", f"candidate {rewrite} replaces it")
        else:
            kept[rewrite] = Rejection("not_improved", f"no policy's reward is above that of candidate {sample}")
    return kept


def select(
    example: Example,
    originals: tuple[Mapping[str, float], Mapping[str, float]],
    candidates: Sequence[Scored],
    by: Filter | None = None,
    *,
    seed: str = "",
) -> Selection:
    """The candidates that make pairs, by the rule of the filter (default Eq. 7).

    `originals`: the rewards of y_-1 and y_1, by name; candidates have the same names. Those that pass are ranked by their average
    reward; of equally good ones the first wins. `seed` is for no_filter. Raises ValueError for a reward of an original that is
    not finite: then nothing can be compared.
    """
    by = by or Filter()
    for index, rewards in enumerate(originals):
        if name := _not_finite(rewards):
            raise ValueError(f"the reward {name!r} of response_{index} is {rewards[name]}: no candidate can be compared with it")
    candidates = [_refuse_not_finite(candidate) for candidate in candidates]
    if by.rule == "separate_responses":
        own = [objective for objective in example.labels if objective in originals[0]]
        return _merge([_best(example, originals, candidates, by, objective) for objective in own])
    best = _best(example, originals, candidates, by, None)
    return _draw(candidates, len(best.chosen), seed) if by.rule == "no_filter" else best


def beaten(example: Example, objective: str | None) -> list[int]:
    """The originals that a response chosen for `objective` was better than: 0 for y_-1, 1 for y_1, each text once.

    For all objectives (None) both; for one of them the one that it prefers.
    """
    if objective is not None:
        return [example.labels[objective]]
    return [0] if example.response_0 == example.response_1 else [0, 1]


def pareto_pairs(example: Example, text: str, objective: str | None = None) -> list[Pair]:
    """D^c of one chosen response: y_c ≻ y_-1 and y_c ≻ y_1, or only the preferred one if it was chosen for one objective."""
    originals = (example.response_0, example.response_1)
    return [Pair(example.prompt, text, originals[index]) for index in beaten(example, objective)]


def _best(
    example: Example,
    originals: Sequence[Mapping[str, float]],
    candidates: Sequence[Scored],
    by: Filter,
    objective: str | None,
) -> Selection:
    """Eq. 7, on all rewards against both originals or on an objective's own against the original that it prefers."""
    names = list(originals[0]) if objective is None else [objective]
    opponents = {index: originals[index] for index in (beaten(example, objective) if objective else [0, 1])}
    rejections = [one if isinstance(one, Rejection) else _compare(one, opponents, names, by.margin) for one in candidates]
    averages = {
        index: math.fsum(rewards[name] for name in names) / len(names)
        for index, (rewards, rejection) in enumerate(zip(candidates, rejections, strict=True))
        if rejection is None and not isinstance(rewards, Rejection)
    }
    ranked = sorted(averages, key=lambda index: -averages[index])
    for index in ranked[by.top_k :]:
        rejections[index] = Rejection(
            "not_best", f"{objective or 'average'} {averages[index]:.4f}, candidate {ranked[0]} has {averages[ranked[0]]:.4f}"
        )
    return Selection([Chosen(candidate=index, objective=objective) for index in ranked[: by.top_k]], rejections)


def _merge(selections: Sequence[Selection]) -> Selection:
    """Of several objectives: a candidate is chosen if one of them chose it, or else rejected as by the one it came closest to."""
    rejections: list[Rejection | None] = []
    for column in zip(*(selection.rejections for selection in selections), strict=True):
        found = [rejection for rejection in column if rejection is not None]
        closest = sorted(found, key=lambda rejection: rejection.rule != "not_best")
        rejections.append(closest[0] if len(found) == len(column) else None)
    return Selection([chosen for selection in selections for chosen in selection.chosen], rejections)


def _draw(candidates: Sequence[Scored], count: int, seed: str) -> Selection:
    usable = [index for index, one in enumerate(candidates) if not isinstance(one, Rejection)]
    drawn = random.Random(seed).sample(usable, count)
    not_drawn = Rejection("not_drawn", f"{count} of {len(usable)} were drawn")
    rejections = [
        one if isinstance(one, Rejection) else None if index in drawn else not_drawn for index, one in enumerate(candidates)
    ]
    return Selection([Chosen(candidate=index) for index in drawn], rejections)


def _compare(
    rewards: Mapping[str, float], originals: Mapping[int, Mapping[str, float]], names: Sequence[str], margin: float
) -> Rejection | None:
    """None if every reward beats the originals, otherwise the reward by which it falls furthest short."""
    for index, original in originals.items():
        if rewards.keys() != original.keys():
            raise ValueError(f"rewards of different models: {sorted(rewards)} against {sorted(original)} of response_{index}")
    differences = [(rewards[name] - original[name], name, index) for index, original in originals.items() for name in names]
    difference, name, index = min(differences)
    if difference > margin:
        return None
    wanted = f", the margin is {margin:g}" if margin else ""
    return Rejection("worse_than_original", f"{name} {difference:+.4f} against response_{index}{wanted}")


def _refuse_not_finite(candidate: Scored) -> Scored:
    if not isinstance(candidate, Rejection) and (name := _not_finite(candidate)):
        return Rejection("not_finite", f"{name} is {candidate[name]}")
    return candidate


def _not_finite(rewards: Mapping[str, float]) -> str | None:
    return next((name for name, value in rewards.items() if not math.isfinite(value)), None)
