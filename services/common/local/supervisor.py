"""Runs the processes of one machine: starts them in order, restarts those that crash, stops them in the reverse order.

    Supervisor(stack_specs(settings), settings.data_dir, on_progress=print).run()      # until SIGINT or SIGTERM

    async with Supervisor(specs, data_dir) as stack:                                   # or for the time of a body
        ...

Each process has its own session and log file, <data_dir>/logs/<name>.log, and ends when the supervisor ends, even by SIGKILL.
What the processes do is not known here.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx
import redis.asyncio
from redis.exceptions import RedisError

from services.common.background import BAD_SETTINGS
from services.common.local.processes import dies_with_parent
from sipo.errors import Conflict, SipoError

TAIL = 2000  # characters of a log that tell why a process ended


@dataclass(frozen=True)
class ProcessSpec:
    """One process. It is ready when `ready_url` answers: http(s)://… with 2xx, redis://… to a ping; None: once it runs.
    Once it has been ready, any HTTP answer will do when it is started again: what it then waits for, such as a training's end, may
    take hours.

    It starts when all of `after` have been ready, and stops before any of them.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    ready_url: str | None = None
    after: tuple[str, ...] = ()


class ProcessFailed(SipoError):
    """A process could not be brought to run; the message has the end of its log."""

    code = "process_failed"


OnProgress = Callable[[str, str], None]
"""Called with a process's name and what happened to it: starting, ready, a crash with the reason, stopped."""


class _Child:
    def __init__(self, spec: ProcessSpec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self.was_ready = asyncio.Event()
        self.dismissed = asyncio.Event()  # nothing needs it any more: it is to end
        self.ended = asyncio.Event()  # for good: nothing will start it again
        self.started_at = 0  # size of the log when the present process began

    def tail(self) -> str:
        """The end of what the last process wrote."""
        with self.log.open("rb") as log:
            log.seek(max(self.started_at, self.log.stat().st_size - TAIL))
            return log.read().decode(errors="replace").strip()


class Supervisor:
    """`ready_timeout`, `grace` (from SIGTERM to SIGKILL) and `backoff` (shortest and longest pause before a restart) in seconds.

    A process that was never ready is given up after `max_starts` crashes in a row; one that was is restarted for ever.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        data_dir: Path,
        *,
        on_progress: OnProgress | None = None,
        ready_timeout: float = 600.0,
        grace: float = 30.0,
        backoff: tuple[float, float] = (0.5, 30.0),
        max_starts: int = 3,
    ) -> None:
        names = [spec.name for spec in specs]
        assert len(set(names)) == len(names) and all(name in names for spec in specs for name in spec.after)
        self.data_dir = data_dir
        self.ready_timeout = ready_timeout
        self.grace = grace
        self.backoff = backoff
        self.max_starts = max_starts
        self._tell = on_progress or (lambda name, news: None)
        self._children = {spec.name: _Child(spec, data_dir / "logs" / f"{spec.name}.log") for spec in specs}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._signal: int | None = None  # the last that asked to stop
        self._failure: ProcessFailed | None = None
        self._lock: IO[str] | None = None

    def run(self) -> None:
        """Until SIGINT or SIGTERM. Raises ProcessFailed, Conflict if another supervisor has this data folder, and SystemExit, with
        the signal's status, if it was stopped before all processes were ready."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, number)
        async with self:
            all_ready = all(child.was_ready.is_set() for child in self._children.values())
            await self.wait()
        if not all_ready and self._signal is not None:
            raise SystemExit(128 + self._signal)

    def _interrupt(self, number: int) -> None:
        self._signal = number
        self._stopping.set()

    async def wait(self) -> None:
        """Until it is asked to stop; raises ProcessFailed if a process had to be given up."""
        await self._stopping.wait()
        if self._failure:
            raise self._failure

    async def __aenter__(self) -> Self:
        """Starts all and waits until all are ready (or a signal asked to stop)."""
        self._claim_data_dir()
        self._tasks = [asyncio.create_task(self._keep(child)) for child in self._children.values()]
        try:
            await _first(asyncio.gather(*(child.was_ready.wait() for child in self._children.values())), self._stopping.wait())
            if self._failure:
                raise self._failure
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ends every process, those that others need after those others: SIGTERM, and SIGKILL after the grace."""
        self._stopping.set()
        await asyncio.gather(*(self._dismiss(child) for child in self._children.values()), *self._tasks)
        if self._lock:
            self._lock.close()

    async def _dismiss(self, child: _Child) -> None:
        dependants = [other for other in self._children.values() if child.spec.name in other.spec.after]
        await asyncio.gather(*(other.ended.wait() for other in dependants))
        child.dismissed.set()

    def _claim_data_dir(self) -> None:
        (self.data_dir / "logs").mkdir(parents=True, exist_ok=True)
        self._lock = (self.data_dir / "supervisor.lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read()
            self._lock.close()
            raise Conflict(
                f"SIPO runs on {self.data_dir} already (process {owner}): stop it, or set another SIPO_DATA_DIR"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    async def _keep(self, child: _Child) -> None:
        """One process's life: start, ready, crash, pause, again; its end when it is dismissed."""
        crashes = 0
        clock = asyncio.get_running_loop().time
        shortest, longest = self.backoff
        process: asyncio.subprocess.Process | None = None
        try:
            await _first(
                asyncio.gather(*(self._children[name].was_ready.wait() for name in child.spec.after)), self._stopping.wait()
            )
            while not self._stopping.is_set():
                process, begin = await self._start(child), clock()
                await self._until_ready(child, process)
                await _first(process.wait(), child.dismissed.wait())
                if child.dismissed.is_set():
                    await self._terminate(child, process)
                _kill(process)  # what it may have left behind in its session
                if self._stopping.is_set():
                    break
                crashes = crashes + 1 if clock() - begin < longest else 1
                why = f"ended with status {process.returncode}\n{child.tail()}"
                if process.returncode == BAD_SETTINGS or (crashes >= self.max_starts and not child.was_ready.is_set()):
                    self._give_up(child, why)
                    break
                pause = min(shortest * 2 ** (crashes - 1), longest)
                self._tell(child.spec.name, f"{why}\nstarting again in {pause:.1f} s")
                await _first(asyncio.sleep(pause), self._stopping.wait())
        except Exception as error:  # no such program, no room for its log; or a bug of ours, for whose end nobody should wait
            if process is not None:
                _kill(process)
            self._give_up(child, f"cannot run: {error}")
        finally:
            child.ended.set()

    def _give_up(self, child: _Child, why: str) -> None:
        self._failure = ProcessFailed(f"{child.spec.name} {why}\nits log: {child.log}")
        self._stopping.set()

    async def _start(self, child: _Child) -> asyncio.subprocess.Process:
        self._tell(child.spec.name, "starting")
        with child.log.open("ab") as log:
            child.started_at = log.tell()
            return await asyncio.create_subprocess_exec(
                *child.spec.argv,
                env={**os.environ, **child.spec.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the supervisor, which stops them in order
                preexec_fn=dies_with_parent(),
            )

    async def _until_ready(self, child: _Child, process: asyncio.subprocess.Process) -> None:
        clock = asyncio.get_running_loop().time
        begin = clock()
        while process.returncode is None and not self._stopping.is_set():
            again = child.was_ready.is_set()
            if await _answers(child.spec.ready_url, ready=not again):
                child.was_ready.set()
                self._tell(child.spec.name, f"{'answers' if again else 'ready'} after {clock() - begin:.1f} s")
                return
            if clock() - begin > self.ready_timeout:
                self._tell(child.spec.name, f"not ready within {self.ready_timeout:.0f} s")
                _kill(process)
                return
            await _first(asyncio.sleep(0.2), self._stopping.wait())

    async def _terminate(self, child: _Child, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self.grace)
            self._tell(child.spec.name, "stopped")
        except TimeoutError:
            self._tell(child.spec.name, f"killed after {self.grace:.0f} s of grace")
            _kill(process)
            await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody is left; on macOS: only zombies are
        os.killpg(process.pid, signal.SIGKILL)


async def _first(*waits: Awaitable[Any]) -> None:
    """Until one of them is over; the others are cancelled."""
    futures = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in futures:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)  # or the loop complains that nobody asked how they ended


async def _answers(url: str | None, *, ready: bool) -> bool:
    """With 2xx if it has to be `ready`."""
    if url is None:
        return True
    if url.startswith("redis"):
        client = redis.asyncio.Redis.from_url(url, retry=None, socket_timeout=2)
        try:
            return bool(await client.ping())
        except RedisError:
            return False
        finally:
            await client.aclose()
    try:
        # No certificates: loading them for every look takes more time than the services have for starting.
        async with httpx.AsyncClient(timeout=2, verify=False) as http:
            return (await http.get(url)).is_success or not ready
    except httpx.HTTPError:
        return False
