"""What an evaluation found: means, fronts and comparisons with their uncertainty, in one record that pictures and pages show.

Every interval is of 95 %, by bootstrap over prompts: the same prompts are drawn for all methods and weights.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from sipo.conversation import Prompt
from sipo.preferences import Weights
from sipo.record import Record

Kind = Literal["base", "mod", "soup", "models"]
"""How a method answers at a weight: the base alone; a set's policies mixed, or merged; or a model of its own for each weight."""


class Interval(Record):
    value: float
    low: float
    high: float


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


class MethodResult(Record):
    """A method, trained with one seed."""

    name: str
    kind: Kind
    source: str = Field(description="the policy set, or the folders, that answered; the base's name for the base")
    points: list[AtWeight]
    front: list[int] = Field(description="the points that no other point of the method dominates, by index")
    hypervolume: Interval = Field(description="what the points dominate, down to the reference point")
    igd_plus: Interval = Field(description="mean distance of the common front of all methods to this one: 0 is best")
    inner_product: Interval | None = Field(description="mean of weight times mean reward (PARM's protocol); None without weights")
    spread: dict[str, float] = Field(description="by objective, from the least to the greatest mean reward of its points")


class Comparison(Record):
    """The difference of two methods' hypervolumes, on the same prompts and as many weights."""

    method: str
    against: str
    difference: Interval
    p_value: float = Field(description="of no difference, two-sided, by the same bootstrap, corrected by Holm's method over all")


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
    reference_point: dict[str, float] = Field(description="of the hypervolume")
    standardised: dict[str, tuple[float, float]] = Field(
        default={}, description="mean and standard deviation of the base's rewards, by which an objective's were standardised"
    )
    max_tokens: int
    methods: list[MethodResult]
    comparisons: list[Comparison]
    samples: list[Sample]
    seconds: dict[str, float] = Field(description="by stage")
    tokens: dict[str, int] = Field(description="generated, by method")
