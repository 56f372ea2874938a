from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from services.common.contract.job_store import Job, JobStore, new_job_id
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.keys import count_field, job_key, lease_keys
from sipo.errors import Conflict, NotFound
from support import PATIENCE

SPEC = JobSpec(policy="demo", max_prompts=3)


@pytest.fixture
def jobs(redis: Redis) -> JobStore:
    return JobStore(redis)


async def test_a_job_is_read_as_it_was_created(jobs: JobStore) -> None:
    job = await jobs.create(SPEC, id=new_job_id(), total=3)
    assert (job.state, job.spec, job.total, job.round) == (JobState.QUEUED, SPEC, 3, 1)
    assert await jobs.get(job.id) == job


async def test_an_id_serves_one_job_only(jobs: JobStore) -> None:
    job = await jobs.create(SPEC)
    with pytest.raises(Conflict):
        await jobs.create(SPEC, id=job.id)


async def test_an_unknown_job_is_not_found(jobs: JobStore) -> None:
    for asked in (
        jobs.get("job-x"),
        jobs.cancel("job-x"),
        jobs.update("job-x", total=1),
        jobs.advance("job-x", JobState.QUEUED, JobState.ALIGNING),
    ):
        with pytest.raises(NotFound, match="job-x"):
            await asked
    assert await jobs.list() == []


async def test_jobs_are_listed_newest_first_and_by_state(jobs: JobStore) -> None:
    first, second = await jobs.create(SPEC), await jobs.create(SPEC)
    await jobs.advance(first.id, JobState.QUEUED, JobState.GENERATING)
    assert [job.id for job in await jobs.list()] == [second.id, first.id]
    assert [job.id for job in await jobs.list(JobState.GENERATING, JobState.TRAINING)] == [first.id]


async def test_advance_sets_state_and_fields_together(jobs: JobStore) -> None:
    job = await jobs.create(SPEC)
    moved = await jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING, sampling_set="demo:1", progress={"step": 1})
    assert (moved.state, moved.sampling_set, moved.progress) == (JobState.GENERATING, "demo:1", {"step": 1})
    assert moved.updated > job.updated


async def test_only_one_of_many_advances_a_job(jobs: JobStore) -> None:
    job = await jobs.create(SPEC)
    tries = (jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING, sampling_set=f"demo:{i}") for i in range(1, 6))
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Job)]
    assert all(isinstance(outcome, Conflict) for outcome in outcomes if outcome is not winner)
    assert (await jobs.get(job.id)).sampling_set == winner.sampling_set


async def test_what_is_true_of_one_round_is_not_set_in_another(jobs: JobStore) -> None:
    """A feeder that was slow to read round 1 must not say how many prompts round 2 has."""
    job = await jobs.create(SPEC)
    assert (await jobs.update(job.id, of_round=1, total=3)).total == 3
    await jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING, round=2, total=None)
    with pytest.raises(Conflict, match="not in round 1"):
        await jobs.update(job.id, of_round=1, total=3)
    assert (await jobs.get(job.id)).total is None
    assert (await jobs.update(job.id, of_round=2, total=1)).total == 1


async def test_a_job_of_before_there_were_versions_is_of_the_first(jobs: JobStore, redis: Redis) -> None:
    job = await jobs.create(SPEC)
    assert await redis.hdel(job_key(job.id), "version") == 1
    assert await jobs.get(job.id) == job
    assert await jobs.list() == [job]
    assert (await jobs.update(job.id, total=1)).total == 1


async def test_a_job_of_another_release_is_refused_and_left_as_it_is(jobs: JobStore, redis: Redis) -> None:
    """Met after a downgrade. It may have other fields, and those that we know may mean something else; other jobs go on."""
    theirs, ours = [await jobs.create(SPEC) for _ in range(2)]
    await redis.hset(job_key(theirs.id), mapping={"version": "2", "round": "[1, 2]"})
    record = await redis.hgetall(job_key(theirs.id))
    for asked in (
        jobs.get(theirs.id),
        jobs.cancel(theirs.id),
        jobs.update(theirs.id, total=1),
        jobs.advance(theirs.id, JobState.QUEUED, JobState.ALIGNING),
    ):
        with pytest.raises(Conflict, match=f"Job {theirs.id} was .* another release: its version is 2, this one reads version 1"):
            await asked
    assert await redis.hgetall(job_key(theirs.id)) == record
    assert [job.id for job in await jobs.list()] == [ours.id]


@pytest.mark.parametrize(
    ("from_state", "to_state"),
    [("queued", "training"), ("generating", "queued"), ("completed", "generating"), ("cancelled", "failed")],
)
async def test_a_way_that_does_not_exist_is_a_bug(jobs: JobStore, from_state: str, to_state: str) -> None:
    job = await jobs.create(SPEC)
    with pytest.raises(AssertionError, match="no way"):
        await jobs.advance(job.id, JobState(from_state), JobState(to_state))


async def test_cancelling_is_final_and_can_be_repeated(jobs: JobStore) -> None:
    job = await jobs.create(SPEC)
    assert (await jobs.cancel(job.id)).state == JobState.CANCELLED
    assert (await jobs.cancel(job.id)).state == JobState.CANCELLED
    with pytest.raises(Conflict, match="is cancelled, not queued"):
        await jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING)
    with pytest.raises(Conflict, match="is cancelled"):
        await jobs.update(job.id, progress={"step": 2})


async def test_a_completed_job_cannot_be_cancelled(jobs: JobStore) -> None:
    job = await jobs.create(SPEC)
    await jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING)
    await jobs.advance(job.id, JobState.GENERATING, JobState.COMPLETED)
    with pytest.raises(Conflict, match="is completed"):
        await jobs.cancel(job.id)


async def test_a_field_that_jobs_do_not_have_is_a_bug(jobs: JobStore) -> None:
    job = await jobs.create(SPEC)
    with pytest.raises(AssertionError, match="colour"):
        await jobs.update(job.id, colour="red")


async def test_counts_are_those_of_the_present_round(jobs: JobStore, redis: Redis) -> None:
    job = await jobs.create(SPEC)
    await redis.hset(job_key(job.id), mapping={count_field(1, "decided"): 5, count_field(2, "decided"): 1})
    assert (await jobs.get(job.id)).counts.decided == 5
    assert (await jobs.update(job.id, round=2)).counts.decided == 1


async def test_a_lease_is_held_by_one_and_waited_for_by_the_next(jobs: JobStore) -> None:
    order: list[str] = []
    acquire, refused = jobs._acquire, asyncio.Event()

    async def ask(**script: Any) -> Any:
        token = await acquire(**script)
        if not token:
            refused.set()
        return token

    async def next_in_line() -> int:
        async with jobs.lease("trainer", ttl=0.3) as lease:
            order.append("next in")
            return lease.token

    async with jobs.lease("trainer", ttl=60) as lease:
        jobs._acquire = ask  # type: ignore[assignment]
        waiting = asyncio.create_task(next_in_line())
        await asyncio.wait_for(refused.wait(), PATIENCE)
        order.append("first out")
    assert await waiting == lease.token + 1
    assert order == ["first out", "next in"]


async def test_a_lease_is_renewed_while_it_is_held(jobs: JobStore, redis: Redis) -> None:
    holder, _ = lease_keys("trainer")
    async with jobs.lease("trainer", ttl=3) as lease:
        await redis.pexpire(holder, 2500)
        async with asyncio.timeout(PATIENCE):
            while await redis.pttl(holder) <= 2500:  # noqa: ASYNC110, the queue server counts the time
                await asyncio.sleep(0.02)
        assert not lease.lost.is_set()


async def test_an_overtaken_holder_can_change_nothing(jobs: JobStore, redis: Redis) -> None:
    job = await jobs.create(SPEC)
    async with jobs.lease("trainer", ttl=0.3) as old:
        await redis.delete("sipo:lease:trainer")  # as if it had been away for longer than the lease
        async with jobs.lease("trainer") as new:
            await asyncio.wait_for(old.lost.wait(), PATIENCE)
            assert new.token > old.token
            with pytest.raises(Conflict, match="lease"):
                await jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING, lease=old)
            await jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING, lease=new)
    assert await redis.exists("sipo:lease:trainer") == 0
