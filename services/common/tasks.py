"""Ending tasks for sure."""

from __future__ import annotations

import asyncio
from typing import Any


async def end_tasks(*tasks: asyncio.Task[Any], every: float = 2.0) -> None:
    """Cancels tasks and waits until all have ended; again `every` so many seconds, as a library may swallow a cancellation.

    redis-py does when it comes in the moment of a reply: a task that runs for ever would then do so.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=every)
