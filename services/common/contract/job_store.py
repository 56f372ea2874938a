"""Jobs in Redis: what they are, which state may follow which, and who may move them.

Input and artifacts are files (services.common.contract.job_files); this module knows only what is small. Counts move with the
queue's hand-overs (services.common.queue), never apart from them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Final, cast

import structlog
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.background import beside
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.keys import JOBS, count_field, job_key, lease_keys
from services.common.contract.records import Kind, Lease, RecordStore, Stored

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


class Job(Stored):
    spec: JobSpec
    state: JobState
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

KIND: Final = Kind(
    name="job",
    record=Job,
    states=JobState,
    index=JOBS,
    key=job_key,
    next=NEXT,
    blank={"id": "", "spec": JobSpec(policy="x"), "state": JobState.QUEUED, "created": 0, "updated": 0},
)


def new_job_id() -> str:
    return KIND.new_id()


class JobStore(RecordStore[Job, JobState]):
    elsewhere: ClassVar = frozenset({"counts"})

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, KIND)
        self._set_counts, self._acquire, self._renew = map(redis.register_script, (SET_COUNTS, ACQUIRE, RENEW))

    async def update(self, id: str, *, lease: Lease | None = None, of_round: int | None = None, **fields: Any) -> Job:
        """As of every record. What is true of one round only says of which: Conflict if the job is in another one."""
        return await self._update(id, lease, fields, of_round)

    async def set_counts(self, id: str, round_: int, counts: Mapping[str, int]) -> None:
        """Counts that their one writer knows as a whole: the trainer those of decisions, from what it has on disk."""
        assert counts.keys() <= Counts.model_fields.keys()
        args = [part for name, number in counts.items() for part in (count_field(round_, name), number)]
        await self._set_counts(keys=[job_key(id)], args=args)

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

    def _read(self, values: Mapping[str, str]) -> Job:
        fields = {name: json.loads(text) for name, text in values.items() if name != "state" and not name.startswith("count:")}
        Job.refuse_another_version(fields)  # before anything else is looked for in it
        counts = {name: values.get(count_field(fields["round"], name), 0) for name in Counts.model_fields}
        return Job.model_validate(fields | {"state": values["state"], "counts": counts})
