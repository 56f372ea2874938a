"""Work that goes on beside what a process is asked for: it is begun loudly, and ended for sure."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that takes the process with it if it dies of an error: what does only part of its work must not look alive, and
    whoever started the process starts it again."""
    task = asyncio.create_task(work)
    task.add_done_callback(_end_process_if_it_died)
    return task


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """Begins `work`, and ends it when the body is over."""
    tasks = [begin(one) for one in work]
    try:
        yield
    finally:
        await end_tasks(*tasks)


async def end_tasks(*tasks: asyncio.Task[Any], every: float = 2.0) -> None:
    """Cancels tasks and waits until all have ended; again `every` so many seconds, as a library may swallow a cancellation.

    redis-py does when it comes in the moment of a reply: a task that runs for ever would then do so.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=every)


def _end_process_if_it_died(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()):
        work = getattr(task.get_coro(), "__qualname__", "")
        log.critical("work in the background died, so the process stops", work=work, exc_info=error)
        signal.raise_signal(signal.SIGTERM)
