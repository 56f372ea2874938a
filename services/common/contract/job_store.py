"""Jobs in Redis: what they are, which state may follow which, and who may move them.

Every change is one script that compares before it sets. Input and artifacts are files (services.common.contract.job_files); this
module knows only what is small. Counts move with the queue's hand-overs (services.common.queue), never apart from them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, cast
from uuid import uuid4

import structlog
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.background import beside
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.keys import JOBS, count_field, job_key, lease_keys
from services.common.contract.versions import SCHEMA_VERSION, Versioned
from sipo.errors import Conflict, NotFound

NEXT: Final[dict[JobState, frozenset[JobState]]] = {
    JobState.QUEUED: frozenset({JobState.ALIGNING, JobState.GENERATING}),
    JobState.ALIGNING: frozenset({JobState.GENERATING}),
    JobState.GENERATING: frozenset({JobState.TRAINING, JobState.COMPLETED}),  # completed: see JobState
    JobState.TRAINING: frozenset({JobState.EVALUATING}),
    JobState.EVALUATING: frozenset({JobState.PUBLISHING}),
    JobState.PUBLISHING: frozenset({JobState.GENERATING, JobState.COMPLETED}),  # generating: the next round
}
"""Which state may follow which; besides, every state that is not an end may be followed by failed and cancelled."""


class Counts(BaseModel):
    """Prompts of the round, by how far they are: each counts in every stage that it has passed."""

    model_config = ConfigDict(frozen=True)

    queued: int = 0
    sampled: int = 0
    decided: int = 0
    accepted: int = 0
    none: int = 0
    failed: int = 0


class Job(Versioned):
    model_config = ConfigDict(frozen=True)
    NAMED_BY: ClassVar = "id"

    id: str
    spec: JobSpec
    state: JobState
    created: datetime
    updated: datetime
    round: int = Field(default=1, description="the present one, of spec.rounds")
    total: int | None = Field(default=None, description="prompts of the round; None until it is known")
    counts: Counts = Counts()
    sampling_set: str | None = Field(default=None, description="policy set that samples in this round")
    reward_set: str | None = Field(default=None, description="policy set whose rewards decide in this round")
    policy_set: str | None = Field(default=None, description="the outcome: the newest set that the job has published")
    progress: dict[str, Any] = Field(default={}, description="of the present stage, as its owner tells it")
    error: str | None = None
    reason: str | None = Field(default=None, description="why it completed before its last round, if it did")
    artifacts: dict[str, str] = Field(default={}, description="file by name, relative to the job's folder")
    notes: list[str] = Field(default=[], description="what was left out of the input, and by which field; what looks wrong in it")


# KEYS job, jobs; ARGV id, time of creation, field and value… -> 1, or 0 if the id is taken
CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
return 1
"""

# KEYS job, lease; ARGV expected states (comma at both ends), token and expected round ('' asks for none), field and value…
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

# KEYS job, jobs; ARGV id, states in which it may go (comma at both ends) -> ok | missing | the state that it is in
DELETE = """
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'missing' end
if not string.find(ARGV[2], ',' .. state .. ',', 1, true) then return state end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 'ok'
"""

# Only of a job that is there: a decision that comes late must not leave half of one. KEYS job; ARGV field and value…
SET_COUNTS = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], unpack(ARGV)) end
"""

# KEYS holder, last token; ARGV ttl in ms -> the token, or 0 if it is held
ACQUIRE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local token = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], token, 'PX', ARGV[1])
return token
"""

# KEYS holder; ARGV token, ttl in ms (0 releases) -> 1, or 0 if it is another's
RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

log = structlog.get_logger(__name__)


def new_job_id() -> str:
    return f"job-{uuid4().hex[:12]}"


@dataclass
class Lease:
    """The right to be the only one. `token` grows with every holder: changes made under an older one are refused (Conflict)."""

    name: str
    token: int
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class JobStore:
    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._create, self._change, self._delete = map(redis.register_script, (CREATE, CHANGE, DELETE))
        self._set_counts, self._acquire, self._renew = map(redis.register_script, (SET_COUNTS, ACQUIRE, RENEW))
        self._left_out: set[str] = set()  # reasons, each logged once: services list the jobs twice a second

    async def create(self, spec: JobSpec, *, id: str | None = None, **fields: Any) -> Job:
        """A queued job. Its input is in its folder already (new_job_id names it), so that nobody meets a job without input."""
        now = datetime.now(UTC)
        job = Job(id=id or new_job_id(), spec=spec, state=JobState.QUEUED, created=now, updated=now, **fields)
        values = job.model_dump(mode="json", exclude={"counts"})
        args: list[str | float] = [job.id, now.timestamp(), *_plain(values)]
        if not await self._create(keys=[job_key(job.id), JOBS], args=args):
            raise Conflict(f"there is a job {job.id!r} already")
        return job

    async def get(self, id: str) -> Job:
        """NotFound, or Conflict if the job is a record of another version."""
        values = cast(dict[str, str], await self.redis.hgetall(job_key(id)))
        if not values:
            raise NotFound(f"no job {id!r}")
        return _job(values)

    async def list(self, *states: JobState) -> list[Job]:
        """Newest first; all, or those in one of the states.

        A record of another version is left out and logged: it is no reason to leave the other jobs alone.
        """
        ids = cast(Sequence[str], await self.redis.zrange(JOBS, 0, -1, desc=True))
        pipeline = self.redis.pipeline(transaction=False)
        for id in ids:
            pipeline.hgetall(job_key(id))
        jobs = [job for values in await pipeline.execute() if values and (job := self._readable(values))]
        return [job for job in jobs if not states or job.state in states]

    def _readable(self, values: dict[str, str]) -> Job | None:
        try:
            return _job(values)
        except Conflict as error:
            if error.message not in self._left_out:
                self._left_out.add(error.message)
                log.warning("left out of the jobs", reason=error.message)
            return None

    async def advance(self, id: str, from_state: JobState, to_state: JobState, *, lease: Lease | None = None, **fields: Any) -> Job:
        """Compare-and-set: NotFound, or Conflict if the job is in another state, a record of another version, or if the lease is
        another's now."""
        allowed = NEXT.get(from_state, frozenset()) | {JobState.FAILED, JobState.CANCELLED}
        assert not from_state.ended and to_state in allowed, f"no way from {from_state} to {to_state}"
        return await self._set(id, [from_state], lease, fields | {"state": to_state})

    async def update(self, id: str, *, lease: Lease | None = None, of_round: int | None = None, **fields: Any) -> Job:
        """Sets fields (progress, total, artifacts…) of a job that has not ended; the state is advance's alone.

        What is true of one round only says of which: Conflict if the job is in another one.
        """
        assert "state" not in fields
        return await self._set(id, [state for state in JobState if not state.ended], lease, fields, of_round)

    async def set_counts(self, id: str, round_: int, counts: Mapping[str, int]) -> None:
        """Counts that their one writer knows as a whole: the trainer those of decisions, from what it has on disk."""
        assert counts.keys() <= Counts.model_fields.keys()
        args = [part for name, number in counts.items() for part in (count_field(round_, name), number)]
        await self._set_counts(keys=[job_key(id)], args=args)

    async def cancel(self, id: str) -> Job:
        """Its messages are dropped from now on. Conflict if it has ended otherwise; cancelling twice is no error."""
        open_states = [state for state in JobState if not state.ended]
        return await self._set(id, [*open_states, JobState.CANCELLED], None, {"state": JobState.CANCELLED})

    async def deletable(self, id: str) -> Job:
        """The job, which has ended. Conflict if it has not: what works on it must be told first."""
        job = await self.get(id)
        if not job.state.ended:
            raise Conflict(f"job {id} is {job.state}: cancel it first")
        return job

    async def delete(self, id: str) -> None:
        """The record of a job that has ended, with its counts: the last that goes of it. NotFound, or Conflict as for deletable."""
        ended = ",".join(state for state in JobState if state.ended)
        outcome = await self._delete(keys=[job_key(id), JOBS], args=[id, f",{ended},"])
        if outcome == "missing":
            raise NotFound(f"no job {id!r}")
        if outcome != "ok":
            raise Conflict(f"job {id} is {outcome}: cancel it first")

    async def _set(
        self, id: str, states: Sequence[JobState], lease: Lease | None, fields: dict[str, Any], of_round: int | None = None
    ) -> Job:
        values = Job.model_validate(_BLANK | fields).model_dump(mode="json", include=set(fields))
        assert values.keys() == fields.keys(), f"not fields of a job: {fields.keys() - values.keys()}"
        values["updated"] = datetime.now(UTC).isoformat()
        token = "" if lease is None else lease.token
        keys = [job_key(id), lease_keys("" if lease is None else lease.name)[0]]
        outcome = await self._change(keys=keys, args=[f",{','.join(states)},", token, of_round or "", *_plain(values)])
        if outcome == "missing":
            raise NotFound(f"no job {id!r}")
        if outcome == "version":
            await self.get(id)  # raises Conflict
        if outcome == "fenced":
            raise Conflict(f"the lease on {lease and lease.name!r} is another's now")
        if outcome == "round":
            raise Conflict(f"job {id} is not in round {of_round} any more")
        if outcome != "ok":
            raise Conflict(f"job {id} is {outcome}, not {' or '.join(states) if len(states) == 1 else 'running'}")
        return await self.get(id)

    @asynccontextmanager
    async def lease(self, name: str, ttl: float = 15.0) -> AsyncIterator[Lease]:
        """Waits for the lease on `name`, holds it while the body runs, and gives it back.

        If renewing fails for `ttl` seconds another may have it: `lost` is set, and changes under it are refused.
        """
        holder, last = lease_keys(name)
        ttl_ms = int(ttl * 1000)
        while not (token := await self._acquire(keys=[holder, last], args=[ttl_ms])):  # noqa: ASYNC110, its holder is elsewhere
            await asyncio.sleep(min(1.0, ttl / 3))
        lease = Lease(name, cast(int, token))
        try:
            async with beside(self._keep(lease, holder, ttl)):
                yield lease
        finally:
            with suppress(RedisError):
                await self._renew(keys=[holder], args=[lease.token, 0])

    async def _keep(self, lease: Lease, holder: str, ttl: float) -> None:
        clock = asyncio.get_running_loop().time
        until = clock() + ttl
        while clock() < until:
            await asyncio.sleep(ttl / 3)
            try:
                asked_at = clock()
                if not await self._renew(keys=[holder], args=[lease.token, int(ttl * 1000)]):
                    break
                until = asked_at + ttl
            except RedisError as error:
                log.warning("lease not renewed", lease=lease.name, error=str(error))
        log.error("lease lost", lease=lease.name, token=lease.token)
        lease.lost.set()


_BLANK: Final = {"id": "", "spec": JobSpec(policy="x"), "state": JobState.QUEUED, "created": 0, "updated": 0}


def _plain(values: dict[str, Any]) -> list[str]:
    """Field, value, field, value…: JSON, but the state as it is, for scripts to compare."""
    return [text for name, value in values.items() for text in (name, value if name == "state" else json.dumps(value))]


def _job(values: dict[str, str]) -> Job:
    fields = {name: json.loads(text) for name, text in values.items() if name != "state" and not name.startswith("count:")}
    Job.refuse_another_version(fields)  # before anything else is looked for in it
    counts = {name: values.get(count_field(fields["round"], name), 0) for name in Counts.model_fields}
    return Job.model_validate(fields | {"state": values["state"], "counts": counts})
