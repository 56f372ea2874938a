"""What a report shows of the job that its policies come from: from candidates to pairs, what the candidates were worth, and how the
training went. Whoever knows jobs fills it in."""

from __future__ import annotations

from pydantic import Field

from sipo.record import Record


class StageShown(Record):
    """Candidates that were made in one way."""

    candidates: int
    truncated: int
    truly_better: int | None = Field(description="than both originals, by the ground truth; None where nobody knows")


class TruthShown(Record):
    """Mean ground truth of one objective, over the prompts with an accepted response."""

    originals: tuple[float, float]
    accepted: float


class RoundShown(Record):
    round: int
    prompts: int
    failed: int = Field(description="prompts without a decision")
    candidates: int
    rejected: dict[str, int] = Field(description="candidates by the rule that rejected them")
    accepted: int = Field(description="prompts with a response that passed the filter")
    pairs: int
    stages: dict[str, StageShown] = Field(default={}, description="by how the candidates were made")
    ground_truth: dict[str, TruthShown] = Field(default={}, description="for the objectives that have a ground-truth function")
    chosen: int = Field(default=0, description="responses that the filter chose")
    chosen_better: int | None = Field(default=None, description="of these, truly better; None where nobody knows")
    available: int | None = Field(default=None, description="prompts with a whole response that is truly better")
    order: dict[str, tuple[int, int]] = Field(
        default={}, description="comparisons with originals that the implicit reward orders rightly, and all, by objective"
    )


class CurvePoint(Record):
    step: int
    loss: float
    accuracy: float | None = None
    validation: bool


class TrainingShown(Record):
    round: int = Field(description="0 is the first alignment")
    objective: str = Field(description="or what else was trained")
    pairs: int = Field(description="or the responses of a fine-tuning")
    steps: int
    loss: tuple[float, float] = Field(description="on the validation pairs, before and after")
    accuracy: tuple[float, float] | None = Field(description="None of a fine-tuning, which knows no better response")
    held_out: bool = Field(description="False: the validation pairs are the training pairs")
    curve: list[CurvePoint] = Field(default=[], description="empty where the training's history was not at hand")


class JobAccount(Record):
    job: str
    policy: str
    rounds: list[RoundShown]
    trainings: list[TrainingShown]
    policy_set: str | None = Field(default=None, description="the newest set that it has published")
    activated: bool = False
    reason: str | None = Field(default=None, description="why there are no more rounds")
    reward_models: dict[str, str] = Field(
        default={},
        description="external ones that filtered the candidates: by name the address, without what may be secret in it "
        "(sipo.evaluation.plan.shown), empty where it is not known any more",
    )
