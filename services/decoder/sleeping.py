"""When the engine sleeps: while policies are trained on its GPU, for which it gives its memory up.

A sleep is a lease: whoever trains asks for it again and again, and the engine wakes by itself when nobody does. Who trains, and
what sleeping does to the memory, is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import structlog

from services.decoder.residency import ResidentSets
from sipo.errors import Unavailable

log = structlog.get_logger(__name__)

RETRY_AFTER = 10.0
"""Seconds after which callers may ask again; nobody knows how long a training takes."""


def refusal() -> Unavailable:
    return Unavailable("the decoder sleeps while policies are being trained on its GPU: try again later", retry_after=RETRY_AFTER)


State = Literal["awake", "draining", "asleep", "waking"]


class Sleeps(Protocol):
    async def sleep(self) -> None:
        """Gives the GPU's memory up. Nothing may run, and no policy set be loaded."""
        ...

    async def wake(self) -> None:
        """Raises if the memory is not there any more."""
        ...


class Sleeper:
    """`sleep` and `wake` say what is wanted; `run` alone tells the engine, so that one change ends before the next begins.

    What runs when it is asked to sleep has `drain` seconds to end.
    """

    def __init__(self, engine: Sleeps, residents: ResidentSets, drain: float) -> None:
        self._engine = engine
        self._residents = residents
        self._drain = drain
        self._engine_is: Literal["awake", "changing", "asleep"] = "awake"
        self._lease: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Event] = set()
        self._changed = asyncio.Event()

    @property
    def state(self) -> State:
        if self._lease is None:
            return "awake" if self._engine_is == "awake" else "waking"
        return "asleep" if self._engine_is == "asleep" else "draining"

    @contextmanager
    def completion(self) -> Iterator[asyncio.Event]:
        """Around every completion, to its last byte; the event is set when it must break off. Raises Unavailable unless awake."""
        if self.state != "awake":
            raise refusal()
        breaks_off = asyncio.Event()
        self._running.add(breaks_off)
        try:
            yield breaks_off
        finally:
            self._running.remove(breaks_off)
            self._changed.set()

    def sleep(self, seconds: float) -> State:
        """Takes no new completions from now on, and sleeps once none runs any more; for so many seconds, counted anew each time."""
        if self._lease is None:
            log.info("asked to sleep", running=len(self._running))
        else:
            self._lease.cancel()
        self._lease = asyncio.get_running_loop().call_later(seconds, self._run_out)
        self._changed.set()
        return self.state

    def wake(self) -> State:
        """Takes completions again, at once if the engine does not sleep yet."""
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None
            self._changed.set()
        return self.state

    def _run_out(self) -> None:
        log.warning("nobody asks for sleep any more: wakes")
        self.wake()

    async def run(self) -> None:
        """Until cancelled. Raises what the engine raises: it is of no use then."""
        while True:
            await self._until(lambda: self._lease is not None)
            limit = asyncio.get_running_loop().call_later(self._drain, self._break_off)
            await self._until(lambda: self._lease is None or not self._running)
            limit.cancel()
            if self._lease is None:
                continue
            self._engine_is = "changing"
            await self._residents.empty()
            await self._engine.sleep()
            self._engine_is = "asleep"
            log.info("asleep")
            await self._until(lambda: self._lease is None)
            self._engine_is = "changing"
            await self._engine.wake()
            self._engine_is = "awake"
            log.info("awake")

    def _break_off(self) -> None:
        """For a reader that stalls, or a very long answer: nobody else is answered until it has ended."""
        log.warning("what is still being answered is broken off", running=len(self._running))
        for breaks_off in self._running:
            breaks_off.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()
