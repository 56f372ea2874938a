"""What a job is: what a caller asks for, the states it goes through, and where it is kept."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sipo.preferences import ObjectiveName, Weights
from sipo.selection import Filter
from sipo.training.settings import TrainSettings


class JobState(StrEnum):
    """queued → aligning (no policies yet) → generating → training → evaluating → publishing → completed | failed | cancelled.

    `stop_after: pairs` goes from generating to completed.
    """

    QUEUED = "queued"
    ALIGNING = "aligning"
    GENERATING = "generating"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


class Request(BaseModel):
    """A caller's input: an unknown field is a mistake, not a wish."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class JobSpec(Request):
    """The body of POST /v1/jobs, its input aside."""

    policy: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")] = Field(
        description="name of the policies to improve; if it has no set yet, one policy per objective is aligned first"
    )
    objectives: list[ObjectiveName] | None = Field(
        default=None, min_length=2, description="default: the set's, or the labels found"
    )
    examples: Literal["conflicting", "all", "non_conflicting"] = "conflicting"
    max_prompts: int | None = Field(default=None, ge=1, description="the first so many of the chosen examples")
    weights: list[Weights] | None = Field(default=None, min_length=1, max_length=32, description="W; default: DESIGN's grid")
    review_weights: Weights | None = Field(default=None, description="w_e; default uniform")
    refine: bool = True
    samples_per_weight: int = Field(default=1, ge=1, le=16)
    temperature: float = Field(default=0.7, ge=0, le=2)
    filter: Filter = Field(default=Filter(), description="which candidates make pairs; default: the paper's Eq. 7")
    seed: int = 0
    max_tokens: int = Field(default=128, ge=1, le=4096)
    review_max_tokens: int = Field(default=96, ge=1, le=4096)
    alignment: TrainSettings = Field(default=TrainSettings(epochs=2, learning_rate=5e-4))
    training: TrainSettings = Field(default=TrainSettings())
    stop_after: Literal["pairs"] | None = None
    activate: bool = False
