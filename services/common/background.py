"""Work that goes on beside what a process is asked for: it is begun loudly, and ended for sure."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

import structlog

from sipo.errors import InvalidRequest, NotFound

log = structlog.get_logger(__name__)

T = TypeVar("T")

BAD_SETTINGS = 2
"""The exit status after which another start would end the same."""
_WRONG_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def for_the_operator(error: BaseException) -> str | None:
    """One sentence, if `error` is about what the process was given, such as a model's folder; None for what a new start may mend,
    and for bugs."""
    if isinstance(error, InvalidRequest | NotFound):
        return error.message
    if isinstance(error, OSError) and error.errno in _WRONG_PLACE and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}"
    return None


def give_up(sentence: str) -> NoReturn:
    """Ends the process at once: a web server that is asked to stop would show the traceback of its own end."""
    print(sentence, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(BAD_SETTINGS)


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that takes the process with it if it dies of an error: what does only part of its work must not look alive, and
    whoever started the process starts it again. With status 2 and one sentence if that would not help."""
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
        if sentence := for_the_operator(error):
            give_up(sentence)
        work = getattr(task.get_coro(), "__qualname__", "")
        log.critical("work in the background died, so the process stops", work=work, exc_info=error)
        signal.raise_signal(signal.SIGTERM)
