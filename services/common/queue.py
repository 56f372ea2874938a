"""The queue between the services, on Redis Streams: bounded, at least once, handed on exactly once.

    queue = Queue(redis)
    await queue.feed(message, position=7)                       # the gateway: adds, and moves the job's cursor from 7 to 8

    async def generate(delivery: Delivery[PromptQueued]) -> None:
        await delivery.done(CANDIDATES, await make_candidates(delivery.message), counts={"sampled": 1})

    await Consumer(redis, PROMPTS, model=PromptQueued, on_dead=as_failed).run(each(generate))

A message is in one stream at a time. A consumer that takes one holds it by heartbeats; when they cease, another takes it
over. What ends the holding is one script, HAND_OVER: if the message is still the consumer's and there is room in the next
stream, the follow-up is added, the message deleted and the job's counts moved, all or nothing. Unavailable is not failure:
such a message goes back uncounted, and the consumer waits before it takes more. Other errors, and crashes, count as tries; a
message that was tried is retried alone, so that it takes no neighbours with it; after `max_tries` it goes to the stream of
dead messages with the reason. Messages of jobs that have ended are dropped, when taken and when handed over.

Key names and scripts of queue and jobs are here; only services.common.job_store uses them too. What messages mean is not
known here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar, cast
from uuid import uuid4

import structlog
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.common.jobs import JobState
from services.common.messages import PromptDecided, PromptQueued, PromptSampled
from sipo.errors import SipoError, Unavailable

PROMPTS = "sipo:prompts"
CANDIDATES = "sipo:candidates"
DECISIONS = "sipo:decisions"
STREAMS = (PROMPTS, CANDIDATES, DECISIONS)

JOBS = "sipo:jobs"  # sorted set of job ids by time of creation
GROUP = "sipo"  # one group a stream: what it has handled is deleted
CAPACITY = 256  # messages in a stream; a message of candidates has some 20 kB
UNAVAILABLE_WAIT = (0.5, 15.0)  # seconds: the first wait when something is unavailable, doubled up to the second
POLL = 0.5  # seconds between looks for messages that others hold no more
ABSENT = 3600.0  # seconds after which a consumer without messages is forgotten


def dead(stream: str) -> str:
    return f"{stream}:dead"


def job_key(job: str) -> str:
    """A job's hash: JSON values by field, `state` and the counts (see count_field) plain."""
    return f"sipo:job:{job}"


def count_field(round_: int | str, name: str) -> str:
    """Counts are kept by round, so that a new round begins at 0. `queued` is also the round's feed cursor."""
    return f"count:{round_}:{name}"


def lease_keys(name: str) -> tuple[str, str]:
    """(who holds it: a token; the last token given)"""
    return f"sipo:lease:{name}", f"sipo:lease:{name}:token"


ENDED = frozenset(state.value for state in JobState if state.ended)
ENDED_LUA = "{" + ", ".join(f"{state} = true" for state in sorted(ENDED)) + "}"
UNBOUNDED = 2**53  # a capacity: dead messages are never refused

# KEYS stream; ARGV capacity, body -> 1, or 0 if there is no room
PUT = """
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('XADD', KEYS[1], '*', 'data', ARGV[2])
return 1
"""

# KEYS prompts, job; ARGV capacity, body, round, cursor field, expected position -> fed | full | moved | closed
FEED = """
local job = redis.call('HMGET', KEYS[2], 'state', 'round', ARGV[4])
if job[1] ~= 'generating' or job[2] ~= ARGV[3] then return 'closed' end
if (job[3] or '0') ~= ARGV[5] then return 'moved' end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 'full' end
redis.call('XADD', KEYS[1], '*', 'data', ARGV[2])
redis.call('HINCRBY', KEYS[2], ARGV[4], 1)
return 'fed'
"""

# KEYS stream, job, targets…; ARGV group, consumer, entry, capacity and body of each target…, field and increment of each count…
# -> done | lost (the claim is another's now) | dropped (the job has ended) | full
HAND_OVER = f"""
local group, consumer, entry = ARGV[1], ARGV[2], ARGV[3]
if #redis.call('XPENDING', KEYS[1], group, entry, entry, 1, consumer) == 0 then return 'lost' end
local ended = {ENDED_LUA}
local dropped = ended[redis.call('HGET', KEYS[2], 'state')]
if not dropped then
  for i = 3, #KEYS do
    if redis.call('XLEN', KEYS[i]) >= tonumber(ARGV[2 * i - 2]) then return 'full' end
  end
  for i = 3, #KEYS do redis.call('XADD', KEYS[i], '*', 'data', ARGV[2 * i - 1]) end
  for i = 2 * #KEYS, #ARGV, 2 do redis.call('HINCRBY', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
redis.call('XACK', KEYS[1], group, entry)
redis.call('XDEL', KEYS[1], entry)
return dropped and 'dropped' or 'done'
"""

# Takes over what nobody holds: one message that was tried before, alone, or else up to so many that were only handed back.
# KEYS stream; ARGV group, consumer, visibility in ms, how many -> [[entry, fields, tries], …]
TAKE_OVER = """
local group, consumer, idle = ARGV[1], ARGV[2], ARGV[3]
local taken = {}
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], group, 'IDLE', idle, '-', '+', ARGV[4])) do
  local entry, tried = pending[1], pending[4]
  if tried > 0 and #taken > 0 then break end
  for _, claimed in ipairs(redis.call('XCLAIM', KEYS[1], group, consumer, idle, entry)) do
    table.insert(taken, {claimed[1], claimed[2], tried + 1})
  end
  if tried > 0 then break end
end
return taken
"""

# Sets how long messages have been left alone, if they are still the consumer's: 0 holds them, the visibility gives them back.
# KEYS stream; ARGV group, consumer, ms, tries ('' leaves them), entries… -> entries that are another's now
HOLD = """
local lost = {}
for i = 5, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) == 0 then
    table.insert(lost, ARGV[i])
  elseif ARGV[4] == '' then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'JUSTID')
  else
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'RETRYCOUNT', ARGV[4], 'JUSTID')
  end
end
return lost
"""

# Deleting a consumer forgets what it holds, so only one that holds nothing goes. KEYS stream; ARGV group, consumer
LEAVE = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
"""

# KEYS stream, dead; ARGV capacity, entry, body -> 1, or 0 if another was faster or there is no room
REQUEUE = """
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) or redis.call('XDEL', KEYS[2], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[1], '*', 'data', ARGV[3])
return 1
"""

MESSAGES = Counter("sipo_queue_messages", "Deliveries by how they ended", ["stream", "outcome"])
BATCH_SECONDS = Histogram(
    "sipo_queue_batch_seconds", "Time a batch was handled", ["stream"], buckets=(0.01, 0.1, 0.5, 2, 10, 60, 300)
)
DEPTH = Gauge("sipo_queue_depth", "Messages in a stream, by where they are", ["stream", "place"])

log = structlog.get_logger(__name__)

Message = PromptQueued | PromptSampled | PromptDecided
M = TypeVar("M", bound=Message)
T = TypeVar("T")
P = ParamSpec("P")
Fed = Literal["fed", "full", "moved", "closed"]
FollowUp = tuple[str, Message]
Target = tuple[str, int, str]  # stream, its capacity, body


class DeadLetter(BaseModel):
    """A message that could not be handled, as it lay in `stream`, and why."""

    stream: str
    data: str
    reason: str
    tries: int


class Depth(NamedTuple):
    waiting: int
    held: int
    dead: int


def connect(url: str) -> Redis:
    """A client for everything here. protocol=2, because stream replies have another shape in version 3."""
    client: Redis = Redis.from_url(url, decode_responses=True, protocol=2)
    return client


class Queue:
    """The side of producers and operators."""

    def __init__(self, redis: Redis, capacity: int = CAPACITY) -> None:
        self.redis = redis
        self.capacity = capacity
        self._put, self._feed, self._leave, self._requeue = map(redis.register_script, (PUT, FEED, LEAVE, REQUEUE))

    async def put(self, stream: str, message: Message) -> None:
        """Adds a message; waits while the stream is full."""
        while not await self._put(keys=[stream], args=[self.capacity, message.model_dump_json()]):  # noqa: ASYNC110, room is elsewhere
            await asyncio.sleep(0.1)

    async def feed(self, message: PromptQueued, position: int) -> Fed:
        """Adds the round's prompt number `position` (from 0), if that is the next one, and moves the job's cursor past it.

        "moved": another feeder was faster, read the job again; "closed": the job is not generating (or not this round).
        """
        body = message.model_dump_json()
        args: list[str | int] = [self.capacity, body, message.round, count_field(message.round, "queued"), position]
        return cast(Fed, await self._feed(keys=[PROMPTS, job_key(message.job)], args=args))

    async def dead(self, stream: str) -> list[tuple[str, DeadLetter]]:
        """The dead messages of a stream by their entry, oldest first."""
        entries = cast(list[tuple[str, dict[str, str]]], await self.redis.xrange(dead(stream)))
        return [(entry, DeadLetter.model_validate_json(fields["data"])) for entry, fields in entries]

    async def requeue(self, stream: str, entries: Iterable[str] | None = None) -> int:
        """Puts dead messages back, untried: those of `entries`, or all. Returns how many went (room permitting)."""
        chosen = None if entries is None else set(entries)
        moved = 0
        for entry, letter in await self.dead(stream):
            if chosen is None or entry in chosen:
                moved += await self._requeue(keys=[stream, dead(stream)], args=[self.capacity, entry, letter.data])
        return moved

    async def depths(self) -> dict[str, Depth]:
        """How much lies where; also sets the gauges."""
        depths = {}
        for stream in STREAMS:
            held = sum(group["pending"] for group in await _stream_info(self.redis.xinfo_groups(stream)))
            depth = Depth(await self.redis.xlen(stream) - held, held, await self.redis.xlen(dead(stream)))
            for place, number in depth._asdict().items():
                DEPTH.labels(stream, place).set(number)
            depths[stream] = depth
        return depths

    async def tend(self, interval: float = 15.0) -> None:
        """Runs until cancelled: keeps the gauges current and forgets consumers that are gone."""
        while True:
            with suppress(RedisConnectionError, RedisTimeoutError):
                await self.depths()
                await self.forget_absent()
            await asyncio.sleep(interval)

    async def forget_absent(self, absent: float = ABSENT) -> None:
        for stream in STREAMS:
            for group in await _stream_info(self.redis.xinfo_groups(stream)):
                for consumer in await _stream_info(self.redis.xinfo_consumers(stream, group["name"])):
                    if consumer["idle"] >= absent * 1000:
                        await self._leave(keys=[stream], args=[group["name"], consumer["name"]])


async def _stream_info(asked: Awaitable[Any]) -> list[dict[str, Any]]:
    try:
        return cast(list[dict[str, Any]], await asked)
    except ResponseError:  # no such stream yet
        return []


@dataclass(eq=False)
class Delivery(Generic[M]):
    """A message that this consumer holds. It ends in one of done, release and fail; handlers may also just raise."""

    message: M
    tries: int  # this one included
    entry: str
    data: str
    consumer: Consumer[M]

    async def done(
        self, stream: str | None = None, message: Message | None = None, *, counts: Mapping[str, int] | None = None
    ) -> bool:
        """Ends it and hands `message` on to `stream`; moves the job's counts by `counts`. Waits while `stream` is full.

        False if nothing was handed on: the message is another consumer's now, or its job has ended.
        """
        targets = [] if stream is None or message is None else [(stream, self.consumer.capacity, message.model_dump_json())]
        outcome = await self.consumer.hand_over(self.entry, self.message, targets, counts or {})
        return outcome == "done"

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

    async def one(delivery: Delivery[M]) -> None:
        try:
            await handle(delivery)
        except Exception as error:
            await delivery.fail(error)

    async def all_at_once(batch: list[Delivery[M]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for delivery in batch:
                tasks.create_task(one(delivery))

    return all_at_once


@asynccontextmanager
async def consuming(consumers: Sequence[Consumer[M]], handle: Handler[M], grace: float = 10.0) -> AsyncIterator[None]:
    """Runs consumers beside the body, for an application's lifespan. Then they stop; what is in hand after `grace` s goes back.

    A consumer that dies of a bug takes the process with it: a service that consumes no more must not look alive.
    """
    tasks = [asyncio.create_task(consumer.run(handle)) for consumer in consumers]
    for task in tasks:
        task.add_done_callback(_end_process_if_it_died)
    try:
        yield
    finally:
        for consumer in consumers:
            consumer.stop()
        await asyncio.wait(tasks, timeout=grace)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


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
        heartbeat = asyncio.create_task(self._beat())
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
            heartbeat.cancel()
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
            wait = min(POLL, self.visibility_ms / 1000) if until is None else until - clock()
            if wait <= 0 or not (entries := await self._insist(self._read, self.batch - len(taken), wait)):
                break
            for entry, fields in entries:
                taken += await self._receive(entry, fields, tries=1)
        return taken

    async def _read(self, room: int, wait: float) -> list[tuple[str, dict[str, str]]]:
        block = max(1, int(wait * 1000))  # 0 would be for ever
        found: Any = await self.redis.xreadgroup(self.group, self.name, {self.stream: ">"}, count=room, block=block)
        return cast(list[tuple[str, dict[str, str]]], found[0][1] if found else [])

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
        self, entry: str, message: Message | None, targets: Sequence[Target], counts: Mapping[str, int]
    ) -> Literal["done", "lost", "dropped"]:
        """HAND_OVER, waiting for room. Raises Unavailable if stopped while waiting."""
        keys = [self.stream, _job_key(message), *(stream for stream, _, _ in targets)]
        args: list[str | int] = [self.group, self.name, entry]
        for _, capacity, body in targets:
            args += [capacity, body]
        for name, by in counts.items():
            assert message is not None
            args += [count_field(message.id.split("/")[1], name), by]
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
                if still := [entry for entry in lost if entry in self._held]:
                    log.warning("held too long without heartbeat, now another's", stream=self.stream, entries=still)

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
    return job_key("" if message is None else message.id.split("/")[0])


def _end_process_if_it_died(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.critical("the consumer died", exc_info=error)
        signal.raise_signal(signal.SIGTERM)
