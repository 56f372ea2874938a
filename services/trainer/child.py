"""One training run in a process of its own: memory comes back, a crash stays contained, and it does not outlive this service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import TypeAdapter

from services.common.processes import dies_with_parent
from sipo.errors import TrainingFailed
from sipo.training.settings import METRICS, Failure, Progress, TrainMetrics

LOG = "train.log"
LINE: TypeAdapter[Progress | Failure] = TypeAdapter(Progress | Failure)


async def run_child(run: Path, report: Callable[[Progress], Awaitable[None]]) -> TrainMetrics:
    """Runs `python -m sipo.training` on a run.yaml; ends the process if cancelled. Raises TrainingFailed with what the run said."""
    folder = run.parent
    with (folder / LOG).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sipo.training",
            str(run),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            preexec_fn=dies_with_parent(),
        )
    failure = None
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            said = LINE.validate_json(line)
            if isinstance(said, Failure):
                failure = said
            else:
                await report(said)
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if failure is not None:
        raise TrainingFailed(failure.error)
    if status != 0:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
        raise TrainingFailed(
            f"the training process ended with status {status}: {lines[-1] if lines else 'it said nothing'} (see {folder / LOG})"
        )
    return TrainMetrics.model_validate_json((folder / METRICS).read_text())
