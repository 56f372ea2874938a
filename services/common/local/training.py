"""One training run in a process of its own (services.common.local.child)."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog
from pydantic import TypeAdapter

from services.common.local.child import Work
from sipo.errors import InvalidRequest, TrainingFailed
from sipo.files import expanded
from sipo.training.settings import ACCELERATE, Failure, Progress

LOG = "train.log"
LINE: TypeAdapter[Progress | Failure] = TypeAdapter(Progress | Failure)
MODULE = ("-m", "sipo.training")
log = structlog.get_logger(__name__)

Tell = Callable[[Progress], Awaitable[None]]
"""Hears how far a run is."""


def launch_command(accelerate: str | None = None, *, gpu_memory: float = 1) -> list[str]:
    """What a run.yaml is appended to: one process, or `accelerate launch` with a configuration (a file, or a shipped one's name).
    Each may take `gpu_memory` of its GPU's memory.

    Raises InvalidRequest for a configuration that is not there.
    """
    module = [*MODULE, "--gpu-memory", str(gpu_memory)]
    if accelerate is None:
        return [sys.executable, *module]
    path = ACCELERATE / f"{accelerate}.yaml"
    if not path.is_file() and not (path := expanded(accelerate)).is_file():
        shipped = ", ".join(sorted(one.stem for one in ACCELERATE.glob("*.yaml")))
        raise InvalidRequest(f"no accelerate configuration {accelerate!r}: give a file, or one of {shipped}")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *module]


async def run_child(run: Path, tell: Tell, command: Sequence[str] | None = None) -> None:
    """Runs `command` (default: one process) on a run.yaml, whose folder is finished then; ends the process if cancelled.

    A process that ends early without saying why is started again and goes on from its last checkpoint. Raises TrainingFailed with
    what the run said, or when that happens several times without getting further.
    """

    async def hear(told: Progress) -> int:
        if told.note:
            log.info("training", run=str(run.parent), note=told.note)
        await tell(told)
        return told.step if told.stage == "training" else -1

    await Work("training", [*(command or launch_command()), str(run)], run.parent / LOG, LINE, hear, TrainingFailed).run()
