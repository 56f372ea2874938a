"""Work in the background ends when it is told to, and is missed when it dies."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from services.common.background import BAD_SETTINGS, begin, beside, end_tasks

SERVES_WITH_DYING_WORK = """
import asyncio
from services.common import logging
from services.common.background import beside

logging.configure("test")

async def feed():
    await asyncio.sleep(0.01)
    raise ValueError("a bug")

async def main():
    async with beside(feed(), asyncio.sleep(60)):
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_process_whose_work_dies_says_so_and_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", SERVES_WITH_DYING_WORK], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGTERM
    assert '"work": "feed"' in ended.stderr and "ValueError: a bug" in ended.stderr and '"level": "critical"' in ended.stderr


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        ("NotFound('no such model: give a folder')", "no such model: give a folder"),
        ("PermissionError(13, 'Permission denied', '/x')", "cannot use /x: Permission denied"),
    ],
)
def test_what_the_operator_must_mend_ends_the_process_for_good_with_one_sentence(raised: str, sentence: str) -> None:
    code = SERVES_WITH_DYING_WORK.replace('ValueError("a bug")', raised)
    code = f"from sipo.errors import NotFound\n{code}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (BAD_SETTINGS, f"{sentence}\n")


async def test_work_that_ends_or_is_ended_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    seen: list[str] = []

    async def short() -> None:
        seen.append("short")

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            seen.append("long has ended")

    async with beside(short(), long()):
        await asyncio.sleep(0.01)
        assert seen == ["short"]
    assert (seen, raised) == (["short", "long has ended"], [])

    async def fails() -> None:
        raise ValueError("a bug")

    await asyncio.wait([begin(fails())])
    assert raised == [signal.SIGTERM]


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
