"""The side of producers and operators: put messages in, look at what lies where, bring dead ones back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Literal, NamedTuple, cast

from prometheus_client import Gauge
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.common.contract.keys import CAPACITY, GROUP, PROMPTS, STREAMS, count_field, dead, job_key
from services.common.contract.messages import Message, PromptQueued
from services.common.contract.versions import Versioned
from services.common.queue.scripts import DISCARD, FEED, LEAVE, PUT, REQUEUE

ABSENT = 3600.0  # seconds after which a consumer without messages is forgotten

DEPTH = Gauge("sipo_queue_depth", "Messages in a stream, by where they are", ["stream", "place"])

Fed = Literal["fed", "full", "moved", "closed"]


class DeadLetter(Versioned):
    """A message that could not be handled, as it lay in `stream`, and why."""

    NAMED_BY: ClassVar = "stream"

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


async def unanswered(redis: Redis) -> str | None:
    """None if the queue server answers, otherwise what to say: for an application's readiness."""
    try:
        await redis.ping()
    except RedisError as error:
        return f"the queue server does not answer: {error}"
    return None


class Queue:
    """The side of producers and operators."""

    def __init__(self, redis: Redis, capacity: int = CAPACITY) -> None:
        self.redis = redis
        self.capacity = capacity
        self._put, self._feed, self._leave = map(redis.register_script, (PUT, FEED, LEAVE))
        self._requeue, self._discard = map(redis.register_script, (REQUEUE, DISCARD))

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
        """The dead messages of a stream by their entry, oldest first. Conflict if one is a record of another version."""
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

    async def discard(self, job: str, models: Mapping[str, type[Message]]) -> None:
        """Takes all messages of a job that has ended out of the streams, dead ones too: whoever holds one has lost it.

        `models`: what each stream carries. What cannot be read as such is nobody's, and stays.
        """
        for stream, model in models.items():
            for entry, letter in await self.dead(stream):
                if _job_of(letter.data, model) == job:
                    await self.redis.xdel(dead(stream), entry)
            for entry, fields in cast(list[tuple[str, dict[str, str]]], await self.redis.xrange(stream)):
                if _job_of(fields.get("data", ""), model) == job:
                    await self._discard(keys=[stream], args=[GROUP, entry])

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


def _job_of(data: str, model: type[Message]) -> str | None:
    try:
        return model.model_validate_json(data).job
    except ValidationError:
        return None


async def _stream_info(reply: Awaitable[Any]) -> list[dict[str, Any]]:
    try:
        return cast(list[dict[str, Any]], await reply)
    except ResponseError:  # no such stream yet
        return []
