"""What a job came to: a file of the job, written by the trainer, read by gateway and command line."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from services.common.contract.versions import Versioned
from sipo.evaluation.report import Interval
from sipo.record import Record
from sipo.training.settings import SftMetrics, TrainMetrics


class Funnel(Record):
    """From prompts to accepted responses."""

    prompts: int
    failed: int = Field(description="prompts without a decision")
    candidates: int
    rejected: dict[str, int] = Field(description="candidates by the rule that rejected them, most frequent first")
    accepted: int = Field(description="prompts with a response that beats both originals: one response each")
    pairs: int


class GroundTruth(Record):
    """Mean ground-truth rewards of one objective, over the accepted prompts."""

    response_0: float
    response_1: float
    accepted: float


class StageAccount(Record):
    """Of the candidates that were made in one way."""

    candidates: int
    truncated: int = Field(description="cut off at max_tokens")
    truly_better: int | None = Field(
        description="truncated or not, better by the ground truth than both originals on every objective; None if an objective has "
        "no ground-truth function"
    )
    ground_truth: dict[str, float] = Field(description="mean, for the objectives that have a ground-truth function")


class AcceptedAccount(Record):
    """Of the responses that the filter chose, each judged by the objectives that it was chosen for."""

    responses: int
    truly_better: int | None = Field(description="as in a stage")
    gain: dict[str, float] = Field(description="mean ground truth over that of the better original, by objective")


class BestAvailable(Record):
    """What a filter by ground truth would choose: in each prompt the best of the whole responses that are truly better."""

    prompts: int = Field(description="those with such a response")
    gain: dict[str, float] = Field(description="mean ground truth over that of the better original, by objective")


class ImplicitOrder(Record):
    """How an objective's implicit reward orders scored candidates against each original, by the objective's ground truth."""

    comparisons: int = Field(description="without those in which the ground truth is equal")
    right: int


class CandidatesAccount(Record):
    """What the candidates of a round were worth, whatever the filter made of them."""

    stages: dict[str, StageAccount] = Field(description="by the candidates' stage: sample, rewrite, distilled")
    accepted: AcceptedAccount
    best_available: BestAvailable | None = Field(description="None if an objective has no ground-truth function")
    implicit_order: dict[str, ImplicitOrder] = Field(description="for the objectives that have a ground-truth function")


class RoundEvaluation(Record):
    """The policies before and after a round, on prompts that the job does not train on: figures of an evaluation's report."""

    prompts: int
    hypervolume: dict[str, Interval] = Field(default={}, description="by method: before and after")
    difference: Interval | None = Field(default=None, description="of after to before, on the same prompts")
    p_value: float | None = Field(default=None, description="of no difference")
    error: str | None = Field(default=None, description="why there are no figures")


class RoundReport(Record):
    round: int
    sampling_set: str
    reward_set: str
    funnel: Funnel
    ground_truth: dict[str, GroundTruth] = Field(description="for the objectives that have a ground-truth function")
    candidates: CandidatesAccount | None = Field(default=None, description="None in reports of before there was such an account")
    training: dict[str, TrainMetrics] = Field(description="by objective; empty if nothing was trained")
    evaluation: RoundEvaluation | None = Field(default=None, description="None if the job did not ask for one")
    policy_set: str | None = Field(description="what the round published")


class Report(Versioned, Record):
    NAMED_BY: ClassVar = "job"

    job: str
    policy: str
    objectives: list[str]
    sft: SftMetrics | None = Field(default=None, description="of the fine-tuning that the job did before its alignment")
    alignment: dict[str, TrainMetrics] = Field(description="by objective; empty if the job started from policies")
    rounds: list[RoundReport]
    policy_set: str | None = Field(description="the outcome: the newest set that the job has published")
    activated: bool
    reason: str | None = Field(description="why there are no more rounds, if fewer came to an end than the job asked for")
