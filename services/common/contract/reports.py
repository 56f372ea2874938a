"""What a job came to: a file of the job, written by the trainer, read by gateway and command line."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from services.common.contract.versions import Versioned
from sipo.record import Record
from sipo.training.settings import TrainMetrics


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


class RoundReport(Record):
    round: int
    sampling_set: str
    reward_set: str
    funnel: Funnel
    ground_truth: dict[str, GroundTruth] = Field(description="for the objectives that have a ground-truth function")
    training: dict[str, TrainMetrics] = Field(description="by objective; empty if nothing was trained")
    policy_set: str | None = Field(description="what the round published")


class Report(Versioned, Record):
    NAMED_BY: ClassVar = "job"

    job: str
    policy: str
    objectives: list[str]
    alignment: dict[str, TrainMetrics] = Field(description="by objective; empty if the job started from policies")
    rounds: list[RoundReport]
    policy_set: str | None = Field(description="the outcome: the newest set that the job has published")
    activated: bool
    reason: str | None = Field(description="why there are no more rounds, if fewer came to an end than the job asked for")
