"""Tasks that are told to end do end."""

from __future__ import annotations

import asyncio

from services.common.tasks import end_tasks


async def test_a_swallowed_cancellation_is_repeated() -> None:
    swallowed = 0

    async def deaf() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed += 1

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await end_tasks(task, every=0.01)
    assert task.cancelled() and swallowed == 1


async def test_tasks_that_have_ended_are_left_alone() -> None:
    async def fails() -> None:
        raise ValueError("once")

    task = asyncio.create_task(fails())
    await asyncio.wait({task})
    await end_tasks(task)
    assert isinstance(task.exception(), ValueError)
    await end_tasks()
