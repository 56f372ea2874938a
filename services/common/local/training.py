"""One training run in a process of its own: memory comes back, a crash stays contained, and it does not outlive this service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import structlog
from pydantic import TypeAdapter

from services.common.local.processes import dies_with_parent
from sipo.errors import InvalidRequest, TrainingFailed
from sipo.files import expanded
from sipo.training.run_folder import METRICS
from sipo.training.settings import ACCELERATE, Failure, Progress, TrainMetrics

LOG = "train.log"
LAUNCHER_GRACE = 20.0
"""Seconds in which what starts several processes may end them, from SIGTERM to SIGKILL."""
TRIES = 3
"""Times in a row, without a step between, that a run may end early before it is given up."""
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


async def run_child(run: Path, tell: Tell, command: Sequence[str] | None = None) -> TrainMetrics:
    """Runs `command` (default: one process) on a run.yaml; ends the process if cancelled.

    A process that ends early without saying why is started again and goes on from its last checkpoint: it was killed, or one of
    several was, or a device failed. Raises TrainingFailed with what the run said, or when that happens TRIES times without getting
    further.
    """
    furthest, tries = -1, 0
    while True:
        child = _Child(run, tell, command or launch_command())
        status = await child.wait()
        if child.failure is not None:
            raise TrainingFailed(child.failure.error)
        if status == 0:
            return TrainMetrics.model_validate_json((run.parent / METRICS).read_text())
        tries = tries + 1 if child.step <= furthest else 1
        furthest = max(furthest, child.step)
        if tries == TRIES:
            raise TrainingFailed(_how_it_ended(run.parent / LOG, status))
        log.warning("training ended early, goes on", run=str(run.parent), status=status, step=child.step)


class _Child:
    """One process, until it ends. `step`: the last that it told."""

    def __init__(self, run: Path, tell: Tell, command: Sequence[str]) -> None:
        self.run = run
        self.tell = tell
        self.command = command
        self.step = -1
        self.failure: Failure | None = None

    async def wait(self) -> int:
        with (self.run.parent / LOG).open("ab") as log_file:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                str(self.run),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                preexec_fn=dies_with_parent(),
            )
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                told = LINE.validate_json(line)
                if isinstance(told, Failure):
                    self.failure = told
                    continue
                if told.note:
                    log.info("training", run=str(self.run.parent), note=told.note)
                if told.stage == "training":
                    self.step = told.step
                await self.tell(told)
            return await process.wait()
        finally:
            if process.returncode is None:
                ending = asyncio.create_task(_end(process))
                while not ending.done():  # whoever cancels this may do so again meanwhile
                    with suppress(asyncio.CancelledError):
                        await asyncio.shield(ending)


async def _end(process: asyncio.subprocess.Process) -> None:
    # torchrun's own children live in sessions of their own: only it can end them, and only if it is asked.
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), LAUNCHER_GRACE)
    except TimeoutError:
        process.kill()
        await process.wait()


def _how_it_ended(path: Path, status: int) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    how = f"killed by signal {-status}" if status < 0 else f"with status {status}"
    last = lines[-1] if lines else "it said nothing"
    return f"the training process ended {TRIES} times without getting further, {how}: {last} (see {path})"
