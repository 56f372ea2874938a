"""A run tells how far it is, and stops at a loss that is no number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sipo.errors import TrainingFailed
from sipo.training.settings import Progress

REPORT_SECONDS = 1.0
"""Between two reports of the reference's pass; each step of training is reported."""


class Reporter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, objective: str, report: Callable[[Progress], None], pairs: int) -> None:
        """`pairs` are the reference's to do."""
        self.objective = objective
        self.report = report
        self.pairs = pairs
        self.known = 0
        self.said = 0.0
        self.started = time.monotonic()
        self.last = Progress(objective=objective, stage="reference", step=0, of=pairs, seconds_left=0)

    def note(self, text: str) -> None:
        """Tells what changed; the next report is one of progress again."""
        self.known = 0  # what is computed again counts again
        self.report(self.last.model_copy(update={"note": text}))

    def on_reference(self, pairs: int) -> None:
        self.known = min(self.known + pairs, self.pairs)  # a last batch may be filled up
        now = time.monotonic()
        if now - self.said >= REPORT_SECONDS:
            self.said = now
            self._report("reference", self.known, self.pairs, of_them=self.known)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.monotonic()
        self.first_step = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
            raise TrainingFailed(
                f"the training of {self.objective!r} diverged at step {state.global_step}: loss {logs['loss']}, gradient norm "
                f"{logs['grad_norm']}; use a smaller learning_rate"
            )
        self._report(
            "training",
            state.global_step,
            state.max_steps,
            of_them=state.global_step - self.first_step,
            loss=logs["loss"],
            margin=logs.get("rewards/margins"),  # fine-tuning has none
            accuracy=logs.get("rewards/accuracies"),
        )

    def _report(
        self, stage: Literal["reference", "training"], step: int, of: int, *, of_them: int, **measured: float | None
    ) -> None:
        """`of_them` were done since `started`: the time left follows."""
        left = (time.monotonic() - self.started) / of_them * (of - step)
        self.last = Progress(objective=self.objective, stage=stage, step=step, of=of, seconds_left=round(left, 1), **measured)
        self.report(self.last)
