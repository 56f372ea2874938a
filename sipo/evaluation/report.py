"""What an evaluation found: means, fronts and comparisons with their uncertainty, in one record that pictures and pages show.

Every interval is of 95 %, by bootstrap over prompts: the same prompts are drawn for all methods and weights.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Literal

from pydantic import Field

from sipo.conversation import Prompt
from sipo.datasets import ConflictReport
from sipo.evaluation.job_account import JobAccount
from sipo.preferences import Weights
from sipo.record import Record

Kind = Literal["base", "reference", "mod", "soup", "models"]
"""How a method answers at a weight: the base alone, or what a set's policies were trained from, neither of which knows weights; a
set's policies mixed, or merged; or a model of its own for each weight."""


SEED = re.compile(r"(?P<family>.+)@(?P<seed>[0-9]{1,9})")
"""A method's name with the seed that it was trained with."""


def family(name: str) -> str:
    """A method's name without its seed."""
    found = SEED.fullmatch(name)
    return found["family"] if found else name


def seed_of(name: str) -> str | None:
    found = SEED.fullmatch(name)
    return found["seed"] if found else None


class Interval(Record):
    value: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """For people. `sign`: as in a format, "+" for differences."""
        return f"{self.value:{sign}.3f} ({self.low:{sign}.3f} to {self.high:{sign}.3f})"


class AtWeight(Record):
    """A method's answers at one weight, one to each prompt."""

    weights: Weights | None = Field(description="None for a method that knows no weights")
    rewards: dict[str, Interval] = Field(description="mean, by objective")
    tokens: Interval = Field(description="mean length")
    truncated: float = Field(description="share of answers that max_tokens cut off")
    empty: float = Field(description="share of answers without a word")
    distinct: float = Field(description="share of answers that no other prompt got, too")
    dominating: Interval | None = Field(
        default=None, description="share of answers that beat both original responses on every objective, where there are originals"
    )
    over_originals: dict[str, float | None] | None = Field(
        default=None, description="relative improvement (RI of Table 2) of each mean over the best row of `originals`, None over 0"
    )
    length_controlled: dict[str, Interval] = Field(
        default={}, description="mean by objective as if every answer were as long as the first base's are on average"
    )
    got: dict[str, float] | None = Field(
        default=None,
        description="share of each objective in what the weight got: the mean's place between the method's own least and greatest, "
        "normalised over the objectives; None for fewer than two weights",
    )
    also: dict[str, Interval] = Field(default={}, description="mean by further judges, of what is no objective, in their own units")
    also_difference: dict[str, Interval] = Field(default={}, description="of these, to the first base, on the same prompts")
    histograms: dict[str, list[int]] = Field(default={}, description="answers by objective in each of the report's bins")
    divergence: Interval | None = Field(
        default=None,
        description="mean per-token KL of the policy at this weight from its reference, in nats, along its own greedy answers",
    )


class UnseenWeight(Record):
    """A method's answers at a weight that counts for no front: whether it holds between those that were measured."""

    weights: Weights
    rewards: dict[str, Interval] = Field(description="mean, by objective")
    inner_product: Interval = Field(description="of the weights and the mean rewards")
    gap: Interval | None = Field(
        description="the inner product less that of the neighbouring seen weights' mean rewards, interpolated linearly; None for "
        "more than two objectives, and outside the seen weights"
    )


class Calibration(Record):
    """Whether a method's answers follow the weights that it is asked for."""

    difference: Interval = Field(description="mean absolute difference of the asked weight and the got share: 0 is best")
    monotonicity: dict[str, float | None] = Field(
        description="by objective, Spearman's rank correlation of weight and mean reward: 1 is best; None where one does not vary"
    )


class MethodResult(Record):
    """A method, trained with one seed, which the name may end with: `sipo@1`."""

    name: str
    kind: Kind
    source: str = Field(description="the policy set, or the folders, that answered; the base's name for the base")
    points: list[AtWeight]
    front: list[int] = Field(description="the points that no other point of the method dominates, by index")
    hypervolume: Interval = Field(description="what the points dominate, down to the reference point")
    igd_plus: Interval = Field(description="mean distance of the common front of all methods to this one: 0 is best")
    inner_product: Interval | None = Field(description="mean of weight times mean reward (PARM's protocol); None without weights")
    spread: dict[str, float] = Field(description="by objective, from the least to the greatest mean reward of its points")
    calibration: Calibration | None = Field(default=None, description="None for fewer than two weights")
    unseen: list[UnseenWeight] = Field(default=[], description="of methods that answer at any weight")

    @property
    def family(self) -> str:
        """The name without the seed."""
        return family(self.name)


class Improvement(Record):
    """What one method's mean rewards have over another's at one weight, on the same prompts."""

    weights: Weights | None = Field(description="None where neither method knows weights")
    rewards: dict[str, Interval] = Field(description="difference, by objective")
    average: Interval = Field(description="mean of the differences over the objectives (Figure 12)")
    relative: dict[str, float | None] = Field(
        description="RI of Table 2, by objective: the difference in parts of the other's mean, in the judge's own unit; None over 0"
    )
    dominating: Interval | None = Field(
        default=None, description="difference of the shares of answers that beat both originals, where there are originals"
    )
    relative_dominating: float | None = Field(default=None, description="that in parts of the other's share; None over 0")


class Comparison(Record):
    """The difference of two methods' hypervolumes, on the same prompts and as many weights."""

    method: str
    against: str
    difference: Interval
    p_value: float = Field(description="of no difference, two-sided, by the same bootstrap, corrected by Holm's method over all")
    uncorrected: float | None = Field(default=None, description="the p value before that; None in older reports")
    improvements: list[Improvement] = Field(default=[], description="at the weights of both; at all, where one knows none")


class Verdict(Record):
    """What the comparisons of two methods come to over all seeds. "wins": in each, the interval lies above 0 and the corrected p is
    below 0.05; "loses": likewise below 0."""

    method: str = Field(description="name without seed, as is `against`")
    against: str
    seeds: list[str] = Field(description="that were compared; none where neither method has any")
    verdict: Literal["wins", "loses", "not decided"]


class SampleAnswer(Record):
    method: str
    weights: Weights | None
    text: str
    rewards: dict[str, float]


class Sample(Record):
    """What all methods said to one prompt."""

    prompt: Prompt
    answers: list[SampleAnswer]


class EvaluationReport(Record):
    version: Literal[1] = 1
    name: str
    made: datetime
    base: str
    prompts: int
    prompts_sha256: str
    objectives: list[str]
    judges: dict[str, str] = Field(description="address of each objective's reward model")
    also: dict[str, str] = Field(default={}, description="address of each further judge, of what is no objective")
    filtered: dict[str, str] = Field(
        default={}, description="judges that filtered the training pairs: by name, the name of the job's reward model"
    )
    reference_point: dict[str, float] = Field(description="of the hypervolume")
    standardised: dict[str, tuple[float, float]] = Field(
        default={}, description="mean and standard deviation of the base's rewards, by which an objective's were standardised"
    )
    standardised_on: int | None = Field(
        default=None, description="validation prompts whose answers these are of; None: the test prompts themselves"
    )
    max_tokens: int
    methods: list[MethodResult]
    comparisons: list[Comparison]
    verdicts: list[Verdict] = Field(default=[], description="of every two families that were compared")
    originals: dict[str, dict[str, float]] = Field(
        default={},
        description="mean rewards of the originals: of the one that each objective's judge finds better (the key), by objective",
    )
    agreement: dict[str, Interval] = Field(
        default={},
        description="by objective that has an exact function and another judge: the share of pairs of answers to the same prompt "
        "that both order alike",
    )
    bins: dict[str, list[float]] = Field(default={}, description="edges of the histograms, by objective")
    data: dict[str, ConflictReport] = Field(default={}, description="how much the objectives of training data disagree, by file")
    jobs: list[JobAccount] = Field(default=[], description="that the policies come from")
    samples: list[Sample]
    seconds: dict[str, float] = Field(description="by stage")
    tokens: dict[str, int] = Field(description="generated, by method")
