"""The side of those who handle messages: take, hold by heartbeats, and end in exactly one way."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast
from uuid import uuid4

import structlog
from prometheus_client import Counter, Histogram
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.common.background import begin, end_tasks
from services.common.contract.keys import CAPACITY, GROUP, count_field, dead, job_key
from services.common.contract.messages import Message
from services.common.queue.scripts import ENDED, HAND_OVER, HOLD, LEAVE, TAKE_OVER
from services.common.queue.streams import DeadLetter
from sipo.errors import SipoError, Unavailable

UNAVAILABLE_WAIT = (0.5, 15.0)  # seconds: the first wait when something is unavailable, doubled up to the second
TAKE_OVER_POLL_SECONDS = 0.5  # seconds between looks for messages that others hold no more
UNBOUNDED = 2**53  # a capacity: dead messages are never refused

MESSAGES = Counter("sipo_queue_messages", "Deliveries by how they ended", ["stream", "outcome"])
BATCH_SECONDS = Histogram(
    "sipo_queue_batch_seconds", "Time a batch was handled", ["stream"], buckets=(0.01, 0.1, 0.5, 2, 10, 60, 300)
)
log = structlog.get_logger(__name__)

M = TypeVar("M", bound=Message)
T = TypeVar("T")
P = ParamSpec("P")
FollowUp = tuple[str, Message]  # the stream that it goes to, and itself
Outgoing = tuple[str, int, str]  # stream, its capacity, body


@dataclass(eq=False)
class Delivery(Generic[M]):
    """A message that this consumer holds. It ends in one of done, hand_on, release and fail; handlers may also just raise."""

    message: M
    tries: int  # this one included
    entry: str
    data: str
    consumer: Consumer[M]

    async def done(self, *, counts: Mapping[str, int] | None = None) -> bool:
        """Ends it: nothing follows. Moves the job's counts by `counts`.

        False if it did not count: the message is another consumer's now, or its job has ended.
        """
        return await self._end([], counts)

    async def hand_on(self, stream: str, message: Message, *, counts: Mapping[str, int] | None = None) -> bool:
        """Ends it and adds `message` to `stream`, for which it waits while that is full. Moves the job's counts by `counts`.

        False if nothing was added: the message is another consumer's now, or its job has ended.
        """
        return await self._end([(stream, self.consumer.capacity, message.model_dump_json())], counts)

    async def _end(self, targets: Sequence[Outgoing], counts: Mapping[str, int] | None) -> bool:
        return await self.consumer.hand_over(self.entry, self.message, targets, counts or {}) == "done"

    async def release(self, reason: str) -> None:
        """Hands it back uncounted, because something it needs is unavailable; the consumer waits before it takes more."""
        await self.consumer.release(self, reason)

    async def fail(self, error: Exception) -> None:
        """Hands it back as tried, or to the dead messages if it has been tried enough. Unavailable: releases it."""
        if not self.consumer.holds(self):  # it was handed over before the error came
            log.error("error after the end", stream=self.consumer.stream, message=self.message.id, exc_info=error)
        elif isinstance(error, Unavailable):
            await self.release(error.message)
        else:
            await self.consumer.retry_or_bury(self, error)


Handler = Callable[[list[Delivery[M]]], Awaitable[None]]
OnDead = Callable[[M, str], FollowUp | None]


def each(handle: Callable[[Delivery[M]], Awaitable[None]]) -> Handler[M]:
    """A handler of batches from one of single deliveries: all at once, each with its own error."""

    async def handle_one(delivery: Delivery[M]) -> None:
        try:
            await handle(delivery)
        except Exception as error:
            await delivery.fail(error)

    async def all_at_once(batch: list[Delivery[M]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for delivery in batch:
                tasks.create_task(handle_one(delivery))

    return all_at_once


@asynccontextmanager
async def consuming(consumers: Sequence[Consumer[M]], handle: Handler[M], grace: float = 10.0) -> AsyncIterator[None]:
    """Runs consumers beside the body, for an application's lifespan. Then they stop; what is in hand after `grace` s goes back."""
    tasks = [begin(consumer.run(handle)) for consumer in consumers]
    try:
        yield
    finally:
        for consumer in consumers:
            consumer.stop()
        await asyncio.wait(tasks, timeout=grace)
        await end_tasks(*tasks)


class Consumer(Generic[M]):
    """Takes messages in batches and hands them to a handler, one batch at a time; for several at a time run several consumers.

    `linger`: seconds that a batch waits to fill up. `visibility`: seconds without heartbeat (every third of it) after which
    others take a message over; it bounds how long a crash is felt, not how long handling may last. `on_dead` makes the
    message that goes on in place of a dead one, in the same script. `name` must be this consumer's alone; the default is.
    """

    def __init__(
        self,
        redis: Redis,
        stream: str,
        *,
        model: type[M],
        group: str = GROUP,
        name: str | None = None,
        batch: int = 1,
        linger: float = 0.05,
        visibility: float = 30.0,
        max_tries: int = 3,
        on_dead: OnDead[M] | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        self.redis = redis
        self.stream = stream
        self.model = model
        self.group = group
        self.name = name or f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self.batch = batch
        self.linger = linger
        self.visibility_ms = int(visibility * 1000)
        self.max_tries = max_tries
        self.on_dead = on_dead
        self.capacity = capacity
        self._hand_over, self._take_over, self._hold, self._leave = map(redis.register_script, (HAND_OVER, TAKE_OVER, HOLD, LEAVE))
        self._held: dict[str, int] = {}  # tries by entry
        self._holding = asyncio.Lock()  # or a heartbeat on its way would hold what is being given back
        self._stopping = asyncio.Event()
        self._unavailable = False  # something was, while the last batch was handled
        self._backoff = 0.0

    def stop(self) -> None:
        """Ends `run` after the batch in hand."""
        self._stopping.set()

    def running(self, handle: Handler[M], grace: float = 10.0) -> AbstractAsyncContextManager[None]:
        return consuming([self], handle, grace)

    async def run(self, handle: Handler[M]) -> None:
        """Takes and handles until `stop`. The queue server may be away meanwhile; what is held when cancelled is handed back."""
        heartbeat = begin(self._beat())
        try:
            await self._insist(self._join)
            while not self._stopping.is_set():
                batch = await self._drop_ended(await self._take())
                if batch:
                    await self._handle(batch, handle)
                await self._wait_for_the_unavailable()
        except Unavailable as error:  # only while stopping
            log.info("stopped while waiting", stream=self.stream, reason=error.message)
        finally:
            await end_tasks(heartbeat)
            with suppress(RedisError, Unavailable):
                await self._depart()

    async def _take(self) -> list[Delivery[M]]:
        """Up to a batch: first what nobody holds any more, then what is new. A message that was tried before comes alone."""
        taken: list[Delivery[M]] = []
        args: list[str | int] = [self.group, self.name, self.visibility_ms, self.batch]
        for entry, fields, tries in await self._insist(self._take_over, keys=[self.stream], args=args):
            taken += await self._receive(entry, dict(zip(fields[::2], fields[1::2], strict=True)), tries)
        if taken and taken[0].tries > 1:
            return taken
        clock = asyncio.get_running_loop().time
        until = None
        while len(taken) < self.batch and not self._stopping.is_set():
            if taken and until is None:
                until = clock() + self.linger
            wait = min(TAKE_OVER_POLL_SECONDS, self.visibility_ms / 1000) if until is None else until - clock()
            if wait <= 0 or not (entries := await self._insist(self._read, self.batch - len(taken), wait)):
                break
            for entry, fields in entries:
                taken += await self._receive(entry, fields, tries=1)
        return taken

    async def _read(self, room: int, wait: float) -> list[tuple[str, dict[str, str]]]:
        block = max(1, int(wait * 1000))  # 0 would be for ever
        streams: Any = await self.redis.xreadgroup(self.group, self.name, {self.stream: ">"}, count=room, block=block)
        return cast(list[tuple[str, dict[str, str]]], streams[0][1] if streams else [])

    async def _receive(self, entry: str, fields: Mapping[str, str], tries: int) -> list[Delivery[M]]:
        """The delivery; none if the message cannot be read or has been tried enough: then it is dead."""
        self._held[entry] = tries
        data = fields.get("data", "")
        try:
            message = cast(M, self.model.model_validate_json(data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            await self._bury(entry, data, tries, f"not readable as {self.model.__name__}: {where}: {first['msg']}", None)
            return []
        if tries > self.max_tries:
            await self._bury(
                entry, data, self.max_tries, f"each of {self.max_tries} tries ended with its consumer's death", message
            )
            return []
        return [Delivery(message, tries, entry, data, self)]

    async def _drop_ended(self, batch: list[Delivery[M]]) -> list[Delivery[M]]:
        states = [await self._insist(self._state_of, delivery.message) for delivery in batch]
        for delivery, state in zip(batch, states, strict=True):
            if state in ENDED:
                await self.hand_over(delivery.entry, delivery.message, [], {})
        return list(filter(self.holds, batch))

    def holds(self, delivery: Delivery[M]) -> bool:
        """False once it has ended."""
        return delivery.entry in self._held

    async def _state_of(self, message: M) -> str | None:
        return cast(str | None, await self.redis.hget(_job_key(message), "state"))

    async def _handle(self, batch: list[Delivery[M]], handle: Handler[M]) -> None:
        error: Exception = RuntimeError("the handler left it without an outcome")
        try:
            with BATCH_SECONDS.labels(self.stream).time():
                await handle(batch)
        except Exception as caught:
            error = caught
        for delivery in filter(self.holds, batch):
            await delivery.fail(error)

    async def hand_over(
        self, entry: str, message: Message | None, targets: Sequence[Outgoing], counts: Mapping[str, int]
    ) -> Literal["done", "lost", "dropped"]:
        """HAND_OVER, waiting for room. Raises Unavailable if stopped while waiting."""
        keys = [self.stream, _job_key(message), *(stream for stream, _, _ in targets)]
        args: list[str | int] = [self.group, self.name, entry]
        for _, capacity, body in targets:
            args += [capacity, body]
        for name, by in counts.items():
            assert message is not None
            args += [count_field(message.round, name), by]
        while (outcome := await self._insist(self._hand_over, keys=keys, args=args)) == "full":
            if self._stopping.is_set():
                raise Unavailable(f"no room in {', '.join(keys[2:])}")
            await self._pause(0.1)
        self._held.pop(entry, None)
        MESSAGES.labels(self.stream, outcome).inc()
        if outcome == "done":
            self._backoff = 0.0
        else:
            log.info("not handed over", stream=self.stream, message=message and message.id, outcome=outcome)
        return cast(Literal["done", "lost", "dropped"], outcome)

    async def release(self, delivery: Delivery[M], reason: str) -> None:
        log.info("released", stream=self.stream, message=delivery.message.id, reason=reason)
        self._unavailable = True
        await self._give_back(delivery.entry, "released", tries=delivery.tries - 1)

    async def retry_or_bury(self, delivery: Delivery[M], error: Exception) -> None:
        reason = f"{getattr(error, 'code', type(error).__name__)}: {error}"
        context = {"stream": self.stream, "message": delivery.message.id, "tries": delivery.tries, "reason": reason}
        log.warning("failed", **context, exc_info=None if isinstance(error, SipoError) else error)
        if delivery.tries < self.max_tries:
            await self._give_back(delivery.entry, "failed", delay_ms=min(1000 * delivery.tries, self.visibility_ms))
            return
        try:
            await self._bury(delivery.entry, delivery.data, delivery.tries, reason, delivery.message)
        except Unavailable as unavailable:  # stopped before there was room for the follow-up
            await self.release(delivery, unavailable.message)

    async def _bury(self, entry: str, data: str, tries: int, reason: str, message: M | None) -> None:
        letter = DeadLetter(stream=self.stream, data=data, reason=reason, tries=tries)
        targets = [(dead(self.stream), UNBOUNDED, letter.model_dump_json())]
        if message is not None and self.on_dead and (follow_up := self.on_dead(message, reason)):
            targets.append((follow_up[0], self.capacity, follow_up[1].model_dump_json()))
        if await self.hand_over(entry, message, targets, {}) == "done":
            MESSAGES.labels(self.stream, "dead").inc()
            log.error("dead", stream=self.stream, message=message and message.id, tries=tries, reason=reason)

    async def _give_back(self, entry: str, outcome: str, *, tries: int | None = None, delay_ms: int = 0) -> None:
        """Lets anyone take it over after `delay_ms`, with so many tries behind it (None: as many as it has)."""
        args: list[str | int] = [self.group, self.name, self.visibility_ms - delay_ms, "" if tries is None else tries, entry]
        async with self._holding:
            self._held.pop(entry, None)
            await self._insist(self._hold, keys=[self.stream], args=args)
        MESSAGES.labels(self.stream, outcome).inc()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.visibility_ms / 3000)
            try:
                async with self._holding:
                    lost = await self._hold(keys=[self.stream], args=[self.group, self.name, 0, "", *self._held])
            except RedisError as error:
                log.warning("no heartbeat", stream=self.stream, error=str(error))
            else:
                if overtaken := [entry for entry in lost if entry in self._held]:
                    log.warning("held too long without heartbeat, now another's", stream=self.stream, entries=overtaken)

    async def _wait_for_the_unavailable(self) -> None:
        if self._unavailable:
            self._unavailable = False
            first, longest = UNAVAILABLE_WAIT
            self._backoff = min(max(first, 2 * self._backoff), longest)
            await self._pause(self._backoff)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _insist(self, ask: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Asks Redis until it answers: its absence is nobody's failure. Raises Unavailable once stopping."""
        while True:
            try:
                return await ask(*args, **kwargs)
            except (RedisConnectionError, RedisTimeoutError) as error:
                if self._stopping.is_set():
                    raise Unavailable(f"the queue server does not answer: {error}") from error
                log.warning("the queue server does not answer", stream=self.stream, error=str(error))
                await self._pause(1)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                await self._join()  # the server lost its data

    async def _join(self) -> None:
        try:
            await self.redis.xgroup_create(self.stream, self.group, id="0", mkstream=True)  # "$" would miss what is there
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def _depart(self) -> None:
        for entry, tries in list(self._held.items()):
            await self._give_back(entry, "released", tries=tries - 1)
        await self._leave(keys=[self.stream], args=[self.group, self.name])


def _job_key(message: Message | None) -> str:
    return job_key("" if message is None else message.job)
