"""Checkpoints from which a killed run goes on: taken every so many steps, and marked when they are whole and on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sipo.files import sync

CHECKPOINTS = "checkpoints"
WHOLE = "whole"


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every `steps` optimizer steps, besides those at the end of each epoch."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in [*folder.iterdir(), folder]:
            sync(path)
        (folder / WHOLE).touch()
        sync(folder)


def last_checkpoint(run: Path) -> str | None:
    """The run's last whole checkpoint; what a kill left unfinished is removed."""
    found: dict[int, Path] = {}
    for folder in (run / CHECKPOINTS).glob("checkpoint-*"):
        if (folder / WHOLE).exists():
            found[int(folder.name.removeprefix("checkpoint-"))] = folder
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return str(found[max(found)]) if found else None
