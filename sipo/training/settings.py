"""What goes into a training run and what comes out: one run trains one policy, or fine-tunes the base before all of them. Where
they lie: sipo.training.run_folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sipo.preferences import ObjectiveName, Weights
from sipo.prompts import PromptFormat
from sipo.record import Record

ACCELERATE = Path(__file__).parent / "accelerate"
"""The shipped configurations of `accelerate launch`."""

Dtype = Literal["auto", "bfloat16", "float32"]
"""sipo.precision.Precision, without torch."""

Method = Literal["dpo", "sipo", "lw", "modpo"]
"""What a run makes of its pairs: see sipo.training.methods."""


class TrainSettings(Record):
    """One DPO run per objective. Defaults are the small preset for SmolLM2-135M on CPU; docs name the paper's values."""

    epochs: float = Field(default=1, gt=0)
    learning_rate: float = Field(default=2e-4, gt=0)
    beta: float = Field(default=0.1, gt=0, description="beta of Eq. 2, 6 and 8")
    alpha: float = Field(default=0.1, ge=0, description="weight of the NLL term in Eq. 8; a first alignment (Eq. 2) has none")
    batch_size: int = Field(default=8, ge=1, description="pairs per optimizer step")
    micro_batch_size: int = Field(
        default=1, ge=1, description="pairs in one forward; halved when memory runs out, with the batch size kept"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for a third more time")
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="between policy and reference (f-DPO); DPO's own is reverse_kl"
    )
    divergence_alpha: float = Field(default=0.5, gt=0, lt=1, description="of alpha_divergence")
    checkpoint_steps: int = Field(
        default=25, ge=1, description="optimizer steps between checkpoints; a killed run goes on from the last"
    )
    tracker: Literal["none", "trackio", "wandb"] = Field(default="none", description="beside TensorBoard's files; installed by you")
    max_prompt_tokens: int = Field(default=256, ge=1, description="longer prompts are left out and counted")
    max_response_tokens: int = Field(default=256, ge=1, description="longer responses are cut at the end")
    lora_rank: int = Field(default=16, ge=1, description="for a first alignment; a SIPO round goes on with the adapters it has")
    lora_alpha: int = Field(default=32, ge=1)
    max_pairs: int | None = Field(default=None, ge=1, description="at most this many training pairs per objective, drawn by seed")
    seed: int = 0


class Margin(Record):
    """Another objective's frozen policy, for MODPO."""

    adapter: Path
    weight: float = Field(gt=0, description="of its log-ratio: w_i, by the beta that it was trained with over that of this run")


class TrainRun(Record):
    """One policy's run, as its run.yaml says it. The run's folder is where that file lies."""

    method: Method = "dpo"
    objective: ObjectiveName
    base: Path = Field(description="folder of the base model")
    base_name: str = Field(description="the base as the adapter's configuration names it")
    prompt_format: PromptFormat
    reference: Path | None = Field(
        default=None, description="adapter that makes the policy set's reference of the base: it lies beneath the policy, frozen"
    )
    reference_sha256: str | None = Field(default=None, description="of that adapter: the run is of no other")
    start: Path | None = Field(
        default=None,
        description="adapter to go on with, itself frozen as reference of the loss; None: a fresh LoRA, the set's reference as it",
    )
    settings: TrainSettings
    weights: Weights | None = Field(default=None, description="w of lw and modpo")
    margins: list[Margin] = Field(default=[], description="of MODPO: the other objectives")
    dtype: Dtype = Field(
        default="auto", description="of the base's weights (the LoRA's are float32); auto: bfloat16 where the hardware computes it"
    )

    @property
    def beta(self) -> float:
        """Of the loss: MODPO's is divided by the weight of its own objective."""
        if self.method != "modpo":
            return self.settings.beta
        assert self.weights is not None
        return self.settings.beta / self.weights[self.objective]


class SftRun(Record):
    """A supervised fine-tuning, as its run.yaml says it."""

    method: Literal["sft"] = "sft"
    base: Path = Field(description="folder of the base model")
    base_name: str = Field(description="the base as the adapter's configuration names it")
    base_sha256: str
    prompt_format: PromptFormat
    settings: TrainSettings = Field(description="but for NOT_OF_SFT")
    dtype: Dtype = Field(default="auto", description="as a TrainRun's")


class Progress(Record):
    """How far a run is, printed as a line of JSON: pairs whose reference log-probabilities are known, then optimizer steps."""

    objective: str
    stage: Literal["reference", "training"]
    step: int
    of: int
    seconds_left: float
    loss: float | None = Field(default=None, description="of this step, in training; so are the next two")
    margin: float | None = Field(default=None, description="of implicit rewards against the run's reference")
    accuracy: float | None = None
    note: str | None = Field(default=None, description="what changed in the run")


class Failure(Record):
    """The last line of a run that cannot end well."""

    error: str


class Measure(Record):
    """The run's loss and implicit rewards on its validation pairs. A tie is half a hit: before training every pair is one."""

    loss: float
    margin: float
    accuracy: float


ANSWERS = 8
"""Prompts that a policy is asked after a training, at most."""
MIN_ANSWERS = 4
"""Fewer answers tell nothing of a policy."""
ANSWER_TOKENS = 32
"""Longest answer: enough to tell one that is empty, or the same for everybody. Whether answers end at all, so few cannot tell."""


class Answered(Record):
    """What a model answered to some validation prompts, greedily: see sipo.training.answering."""

    prompts: int
    tokens: float = Field(description="mean length, without the end token")
    empty: int = Field(description="answers that ended at once")
    endless: int = Field(description="answers that had not ended after ANSWER_TOKENS")
    distinct: int

    def fault(self, before: Answered) -> str | None:
        """How a training has spoilt the answers, so that the policy should not be published. None if they are too few to tell."""
        if self.prompts < MIN_ANSWERS:
            return None
        if self.empty * 2 > self.prompts > before.empty * 2:
            return f"{self.empty} of {self.prompts} greedy answers are empty, and before the training {before.empty} were"
        if self.distinct == 1 < before.distinct:
            return f"all of {self.prompts} greedy answers are the same, and before the training {before.distinct} were different"
        return None


class TrainMetrics(Record):
    """What a finished run reports."""

    objective: str
    pairs: int = Field(description="trained on")
    validation_pairs: int
    held_out: bool = Field(description="False: too few pairs, the validation pairs are the training pairs")
    prompts_too_long: int = Field(description="pairs left out for it")
    identical: int = Field(description="pairs left out, chosen and rejected being the same")
    responses_cut: int
    steps: int
    best_step: int = Field(description="whose adapter was kept: the least loss on held-out pairs at an epoch's end, or the last")
    micro_batch_size: int
    seconds: float = Field(description="of the process that ended the run")
    dtype: str
    before: Measure
    after: Measure
    answered_before: Answered | None = Field(default=None, description="None where several processes trained")
    answered: Answered | None = None

    @property
    def fault(self) -> str | None:
        """Why the policy should not be published, if it should not."""
        return _fault(self.answered_before, self.answered)


class SftMetrics(Record):
    """What a finished fine-tuning reports. Losses are means over the responses' tokens: of the held-out rows, or of all rows where
    there are too few."""

    rows: int = Field(description="responses trained on")
    validation_rows: int = Field(description="responses held out; 0: too few prompts")
    prompts_too_long: int = Field(description="prompts left out for it")
    responses_cut: int
    steps: int
    best_step: int = Field(description="whose adapter was kept: the least loss on held-out rows at an epoch's end, or the last")
    micro_batch_size: int
    seconds: float = Field(description="of the process that ended the run")
    dtype: str
    loss_before: float
    loss_after: float
    answered_before: Answered | None = Field(default=None, description="None where several processes trained")
    answered: Answered | None = None

    @property
    def fault(self) -> str | None:
        """Why nothing should be aligned on it, if it should not."""
        return _fault(self.answered_before, self.answered)


def _fault(before: Answered | None, after: Answered | None) -> str | None:
    return None if before is None or after is None else after.fault(before)
