"""Work in a process of its own, which tells how far it is in lines of JSON: memory comes back, a crash stays contained, and it does
not outlive this service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import structlog
from pydantic import TypeAdapter

from services.common.local.processes import dies_with_parent
from sipo.errors import SipoError
from sipo.record import Record
from sipo.training.settings import Failure

LAUNCHER_GRACE = 20.0
"""Seconds in which what starts several processes may end them, from SIGTERM to SIGKILL."""
TRIES = 3
"""Times in a row, without getting further, that a process may end early before its work is given up."""
log = structlog.get_logger(__name__)

T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Work(Generic[T]):
    """What a process does. `name` is for people, as "training"; `line` reads what it tells; `hear` is told so, and returns how far
    the work is by it, in any count that grows. `log` is where its stderr goes."""

    name: str
    command: Sequence[str]
    log: Path
    line: TypeAdapter[T | Failure]
    hear: Callable[[T], Awaitable[int]]
    failed: type[SipoError] = SipoError

    async def run(self) -> None:
        """Until it is done; ends the process if cancelled.

        A process that ends early without saying why is started again, and goes on where it was: it was killed, or one of several
        was, or a device failed. Raises `failed` with what the process said, or when that happens TRIES times without getting
        further.
        """
        furthest, tries = -1, 0
        while True:
            child = _Child(self)
            status = await child.wait()
            if child.failure is not None:
                raise self.failed(child.failure.error)
            if status == 0:
                return
            tries = tries + 1 if child.reached <= furthest else 1
            furthest = max(furthest, child.reached)
            if tries == TRIES:
                raise self.failed(self._how_it_ended(status))
            log.warning(f"{self.name} ended early, goes on", folder=str(self.log.parent), status=status, reached=child.reached)

    def _how_it_ended(self, status: int) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        how = f"killed by signal {-status}" if status < 0 else f"with status {status}"
        last = lines[-1] if lines else "it said nothing"
        return f"the {self.name} process ended {TRIES} times without getting further, {how}: {last} (see {self.log})"


@dataclass
class _Child(Generic[T]):
    """One process, until it ends. `reached`: how far it was by the last that it told."""

    work: Work[T]
    reached: int = -1
    failure: Failure | None = field(default=None)

    async def wait(self) -> int:
        with self.work.log.open("ab") as log_file:
            process = await asyncio.create_subprocess_exec(
                *self.work.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                preexec_fn=dies_with_parent(),
            )
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                told = self.work.line.validate_json(line)
                if isinstance(told, Failure):
                    self.failure = told
                    continue
                self.reached = max(self.reached, await self.work.hear(told))
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
