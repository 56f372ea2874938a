"""What a caller asks for, and the states that a job goes through.

It is kept in Redis (services.common.contract.job_store), and what is large of it in files (services.common.contract.job_files).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from services.common.contract.evaluations import RoundEvaluationSpec
from services.common.contract.states import State
from sipo.preferences import ObjectiveName, SamplingMode, Weights
from sipo.record import Record
from sipo.selection import Filter
from sipo.training.data import Design
from sipo.training.settings import TrainSettings


class JobState(State):
    """queued → aligning (no policies yet) → generating → training → evaluating → publishing → completed | failed | cancelled.

    From publishing the next round goes on with generating. `stop_after: pairs`, and a later round that accepts nothing, go from
    generating to completed.
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


class JobSpec(Record):
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
    rounds: int = Field(
        default=1, ge=1, le=16, description="each samples from the policies that the one before published, and publishes a set"
    )
    round_prompts: Literal["unresolved", "all"] = Field(
        default="unresolved",
        description="which of the job's prompts a later round runs: those for which no round before accepted a response; or all",
    )
    sampling_set: str | None = Field(
        default=None, description="NAME:VERSION, the set of this policy that the first round starts from; default: the current one"
    )
    reward_set: Literal["first", "latest"] = Field(
        default="first",
        description="whose rewards decide. first: those of the first alignment, as later policies have seen their own samples; "
        "latest: those that the round starts from",
    )
    mode: SamplingMode = Field(
        default="mod",
        description="how the policies are joined at each weight when they sample, review and rewrite: mixed logits, or a soup",
    )
    refine: bool = True
    samples_per_weight: int = Field(default=1, ge=1, le=16)
    teachers: dict[str, Annotated[int, Field(ge=1, le=16)]] = Field(
        default={}, max_length=8, description="answers per prompt of teachers (SIPO_TEACHERS) beside the policies' own samples"
    )
    temperature: float = Field(default=0.7, ge=0, le=2)
    filter: Filter = Field(default=Filter(), description="which candidates make pairs; default: the paper's Eq. 7")
    seed: int = 0
    max_tokens: int = Field(default=128, ge=1, le=4096)
    review_max_tokens: int = Field(default=96, ge=1, le=4096)
    sft: TrainSettings | None = Field(
        default=None,
        description="of a supervised fine-tuning on all responses of the input, before a first alignment: the policies of all "
        "rounds lie on top of it; null: on the base",
    )
    alignment: TrainSettings = Field(default=TrainSettings(learning_rate=5e-4, alpha=0))
    training: TrainSettings = Field(default=TrainSettings())
    learning_rates: dict[ObjectiveName, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="of a round, for objectives that have their own"
    )
    preferences: Design = Field(
        default="both",
        description="what a round's policies learn of each prompt: y_c over both originals; or one of the designs of the paper's "
        "Figure 8, with the objective's own preferred and dispreferred original",
    )
    evaluation: RoundEvaluationSpec | None = Field(
        default=None, description="evaluate each round's policies, before and after, on prompts that the job does not train on"
    )
    stop_after: Literal["pairs"] | None = None
    activate: bool = Field(
        default=False,
        description="make the last round's set current when the job completes. Those of the rounds before are steps on the way: "
        "callers would get policies that nobody has chosen, and keep them if a later round fails",
    )

    def training_for(self, objective: str) -> TrainSettings:
        own = self.learning_rates.get(objective, self.training.learning_rate)
        return self.training.model_copy(update={"learning_rate": own})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stop_after == "pairs" and self.rounds > 1:
            raise ValueError("stop_after: pairs publishes no policies for a second round: leave one of stop_after and rounds out")
        if self.stop_after == "pairs" and self.evaluation is not None:
            raise ValueError("stop_after: pairs trains no policies to evaluate: leave one of stop_after and evaluation out")
        return self
