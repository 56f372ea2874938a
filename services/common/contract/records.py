"""Records in Redis that move through states, such as jobs: created, read, listed, moved on and deleted.

Every change is one script that compares before it sets. What kinds of records there are is their stores' business
(services.common.contract.job_store, services.common.contract.evaluation_store).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, TypeVar, cast
from uuid import uuid4

import structlog
from pydantic import ConfigDict
from redis.asyncio import Redis

from services.common.contract.keys import lease_keys
from services.common.contract.states import State
from services.common.contract.versions import SCHEMA_VERSION, Versioned
from sipo.errors import Conflict, NotFound

# KEYS record, index; ARGV id, time of creation, field and value… -> 1, or 0 if the id is taken
CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
return 1
"""

# KEYS record, lease; ARGV expected states (comma at both ends), token and expected round ('' asks for none), field and value…
# -> ok | missing | version | fenced | round | the state that it is in
CHANGE = f"""
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'missing' end
if (redis.call('HGET', KEYS[1], 'version') or '{SCHEMA_VERSION}') ~= '{SCHEMA_VERSION}' then return 'version' end
if ARGV[2] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[2] then return 'fenced' end
if not string.find(ARGV[1], ',' .. state .. ',', 1, true) then return state end
if ARGV[3] ~= '' and redis.call('HGET', KEYS[1], 'round') ~= ARGV[3] then return 'round' end
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
return 'ok'
"""

# KEYS record, index; ARGV id, states in which it may go (comma at both ends) -> ok | missing | the state that it is in
DELETE = """
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'missing' end
if not string.find(ARGV[2], ',' .. state .. ',', 1, true) then return state end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 'ok'
"""

log = structlog.get_logger(__name__)


@dataclass
class Lease:
    """The right to be the only one. `token` grows with every holder: changes made under an older one are refused (Conflict)."""

    name: str
    token: int
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Stored(Versioned):
    """What every record has."""

    model_config = ConfigDict(frozen=True)
    NAMED_BY: ClassVar = "id"

    id: str
    state: State
    created: datetime
    updated: datetime


R = TypeVar("R", bound=Stored)
S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Kind(Generic[R, S]):
    """Which records a store keeps. `name` is theirs in sentences and ids, `index` the sorted set of ids by time of creation, `key`
    names a record's hash: JSON values by field, the state plain. `next`: which state may follow which; besides, every state that
    is no end may be followed by failed and cancelled. `blank` has some value for each field without a default."""

    name: str
    record: type[R]
    states: type[S]
    index: str
    key: Callable[[str], str]
    next: Mapping[S, frozenset[S]]
    blank: Mapping[str, Any]

    def new_id(self) -> str:
        return f"{self.name}-{uuid4().hex[:12]}"


class RecordStore(Generic[R, S]):
    elsewhere: ClassVar[frozenset[str]] = frozenset()
    """Fields that are not kept as JSON values of their own."""

    def __init__(self, redis: Redis, kind: Kind[R, S]) -> None:
        self.redis = redis
        self.kind = kind
        self._create, self._change, self._delete = map(redis.register_script, (CREATE, CHANGE, DELETE))
        self._left_out: set[str] = set()  # reasons, each logged once: services list records twice a second

    async def create(self, spec: Any, *, id: str | None = None, **fields: Any) -> R:
        """A queued record of what a caller asks for. Its files are in its folder already (Kind.new_id names it), so that nobody
        meets it without them."""
        now = datetime.now(UTC)
        queued = self.kind.states("queued")
        record = self.kind.record(id=id or self.kind.new_id(), spec=spec, state=queued, created=now, updated=now, **fields)
        values = record.model_dump(mode="json", exclude=set(self.elsewhere))
        args: list[str | float] = [record.id, now.timestamp(), *_plain(values)]
        if not await self._create(keys=[self.kind.key(record.id), self.kind.index], args=args):
            raise Conflict(f"the id {record.id!r} is that of another {self.kind.name}")
        return record

    async def get(self, id: str) -> R:
        """NotFound, or Conflict if it is a record of another version."""
        values = cast(dict[str, str], await self.redis.hgetall(self.kind.key(id)))
        if not values:
            raise NotFound(f"no {self.kind.name} {id!r}")
        return self._read(values)

    async def list(self, *states: S) -> list[R]:
        """Newest first; all, or those in one of the states.

        A record of another version is left out and logged: it is no reason to leave the others alone.
        """
        ids = cast(Sequence[str], await self.redis.zrange(self.kind.index, 0, -1, desc=True))
        pipeline = self.redis.pipeline(transaction=False)
        for id in ids:
            pipeline.hgetall(self.kind.key(id))
        records = [record for values in await pipeline.execute() if values and (record := self._readable(values))]
        return [record for record in records if not states or record.state in states]

    async def advance(self, id: str, from_state: S, to_state: S, *, lease: Lease | None = None, **fields: Any) -> R:
        """Compare-and-set: NotFound, or Conflict if it is in another state, a record of another version, or if the lease is
        another's now."""
        allowed = self.kind.next.get(from_state, frozenset()) | {self.kind.states("failed"), self._cancelled}
        assert not from_state.ended and to_state in allowed, f"no way from {from_state} to {to_state}"
        return await self._set(id, [from_state], lease, fields | {"state": to_state})

    async def update(self, id: str, *, lease: Lease | None = None, **fields: Any) -> R:
        """Sets fields (progress, artifacts…) of a record that has not ended; the state is advance's alone."""
        return await self._update(id, lease, fields)

    async def cancel(self, id: str) -> R:
        """Conflict if it has ended otherwise; cancelling twice is no error."""
        return await self._set(id, [*self._open, self._cancelled], None, {"state": self._cancelled})

    async def deletable(self, id: str) -> R:
        """The record, which has ended. Conflict if it has not: what works on it must be told first."""
        record = await self.get(id)
        if not record.state.ended:
            raise Conflict(f"{self.kind.name} {id} is {record.state}: cancel it first")
        return record

    async def delete(self, id: str) -> None:
        """The last that goes of what has ended. NotFound, or Conflict as for deletable."""
        ended = ",".join(state for state in self.kind.states if state.ended)
        outcome = await self._delete(keys=[self.kind.key(id), self.kind.index], args=[id, f",{ended},"])
        if outcome == "missing":
            raise NotFound(f"no {self.kind.name} {id!r}")
        if outcome != "ok":
            raise Conflict(f"{self.kind.name} {id} is {outcome}: cancel it first")

    @property
    def _open(self) -> list[S]:  # type: ignore[valid-type]  # the method `list` hides the type
        return [state for state in self.kind.states if not state.ended]

    @property
    def _cancelled(self) -> S:
        return self.kind.states("cancelled")

    async def _update(self, id: str, lease: Lease | None, fields: dict[str, Any], of_round: int | None = None) -> R:
        assert "state" not in fields
        return await self._set(id, self._open, lease, fields, of_round)

    async def _set(
        self, id: str, states: Sequence[S], lease: Lease | None, fields: dict[str, Any], of_round: int | None = None
    ) -> R:
        name = self.kind.name
        values = self.kind.record.model_validate({**self.kind.blank, **fields}).model_dump(mode="json", include=set(fields))
        assert values.keys() == fields.keys(), f"not fields of a {name}: {fields.keys() - values.keys()}"
        values["updated"] = datetime.now(UTC).isoformat()
        token = "" if lease is None else lease.token
        keys = [self.kind.key(id), lease_keys("" if lease is None else lease.name)[0]]
        outcome = await self._change(keys=keys, args=[f",{','.join(states)},", token, of_round or "", *_plain(values)])
        if outcome == "missing":
            raise NotFound(f"no {name} {id!r}")
        if outcome == "version":
            await self.get(id)  # raises Conflict
        if outcome == "fenced":
            raise Conflict(f"the lease on {lease and lease.name!r} is another's now")
        if outcome == "round":
            raise Conflict(f"{name} {id} is not in round {of_round} any more")
        if outcome != "ok":
            raise Conflict(f"{name} {id} is {outcome}, not {' or '.join(states) if len(states) == 1 else 'running'}")
        return await self.get(id)

    def _read(self, values: Mapping[str, str]) -> R:
        """Of a record's hash. Raises Conflict for another version."""
        fields = {name: text if name == "state" else json.loads(text) for name, text in values.items()}
        return self.kind.record.model_validate(fields)

    def _readable(self, values: Mapping[str, str]) -> R | None:
        try:
            return self._read(values)
        except Conflict as error:
            if error.message not in self._left_out:
                self._left_out.add(error.message)
                log.warning(f"left out of the {self.kind.name}s", reason=error.message)
            return None


def _plain(values: dict[str, Any]) -> list[str]:
    """Field, value, field, value…: JSON, but the state as it is, for scripts to compare."""
    return [text for name, value in values.items() for text in (name, value if name == "state" else json.dumps(value))]
