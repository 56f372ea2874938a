"""Checkpoints from which a killed run goes on: taken every so many steps, and marked when they are whole and on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sipo.files import sync, sync_tree

CHECKPOINTS = "checkpoints"
WHOLE = "whole"


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every `steps` optimizer steps, besides those at the end of each epoch.

    Those follow the epoch's validation. One before it, of the same step, would let a killed run go on in the next epoch, with this
    one never measured; and it would be written over while it is marked whole.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.steps == 0 and not float(state.epoch).is_integer():
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its own state
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sync_tree(folder)
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
