"""A job that is deleted leaves nothing, and is never half there. On a real queue server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from gateway.app import create_app
from gateway.settings import GatewaySettings
from services.common.contract.job_store import JobStore
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.keys import CANDIDATES, DECISIONS, GROUP, JOBS, PROMPTS, dead, job_key
from services.common.contract.messages import Message, PromptDecided, PromptQueued, PromptSampled
from services.common.queue import Consumer, DeadLetter, Delivery, Queue, each
from services.trainer.rounds import Stages
from sipo.errors import Conflict, NotFound
from sipo.preferences import Example
from sipo.training.settings import TrainMetrics
from support import PATIENCE
from tests.fakes import FakeDecoder
from tests.plans import sampling_plan
from tests.trainer import Tell, decide, policies, submit, trainer

EXAMPLE = Example(prompt="A secret?", response_0="No.", response_1="Yes.", labels={"concise": 0, "warm": 1})


def queued(job: str) -> PromptQueued:
    return PromptQueued(job=job, round=1, prompt="0", example=EXAMPLE, plan=sampling_plan(["concise", "warm"]))


def messages(job: str) -> dict[str, Message]:
    return {
        PROMPTS: queued(job),
        CANDIDATES: PromptSampled(queued=queued(job), candidates=[]),
        DECISIONS: PromptDecided(job=job, round=1, prompt="0", outcome="none", example=EXAMPLE),
    }


@pytest.fixture
async def gateway(tmp_path: Path, redis: Redis) -> AsyncIterator[httpx.AsyncClient]:
    """Without its lifespan: nothing is fed."""
    decoder = httpx.AsyncClient(transport=httpx.ASGITransport(FakeDecoder().app), base_url="http://decoder")
    app = create_app(GatewaySettings(data_dir=tmp_path), decoder, redis)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


async def cancelled(redis: Redis, folder: Path) -> str:
    """A job with its files, whose messages wait and are dead in every stream."""
    store, queue = JobStore(redis), Queue(redis)
    job = (await store.create(JobSpec(policy="demo"))).id
    await store.set_counts(job, 1, {"decided": 1})
    for stream, message in messages(job).items():
        await queue.put(stream, message)
        letter = DeadLetter(stream=stream, data=message.model_dump_json(), reason="a test", tries=3)
        await redis.xadd(dead(stream), {"data": letter.model_dump_json()})
    await store.cancel(job)
    (folder / "jobs" / job / "round-1").mkdir(parents=True)
    (folder / "jobs" / job / "input.jsonl").write_text("{}\n")
    return job


async def lengths(redis: Redis) -> list[int]:
    return [await redis.xlen(name) for stream in (PROMPTS, CANDIDATES, DECISIONS) for name in (stream, dead(stream))]


async def test_of_a_deleted_job_nothing_is_left_and_the_others_are_whole(
    gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path
) -> None:
    other, job = await cancelled(redis, tmp_path), await cancelled(redis, tmp_path)
    assert (await gateway.delete(f"/v1/jobs/{job}")).status_code == 204
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [other]
    assert await lengths(redis) == [1] * 6
    assert (await redis.exists(job_key(job)), await redis.zrange(JOBS, 0, -1)) == (0, [other])
    assert [(await gateway.get(f"/v1/jobs/{name}")).status_code for name in (job, other)] == [404, 200]
    assert (await gateway.delete(f"/v1/jobs/{job}")).status_code == 404


async def test_a_deletion_that_was_interrupted_is_done_by_asking_again(
    gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await cancelled(redis, tmp_path)

    async def interrupted(_store: JobStore, _id: str) -> None:
        raise KeyError("the power went")

    with monkeypatch.context() as patched:
        patched.setattr(JobStore, "delete", interrupted)
        assert (await gateway.delete(f"/v1/jobs/{job}")).status_code == 500
    assert (await gateway.get(f"/v1/jobs/{job}")).json()["state"] == "cancelled"
    assert (await gateway.delete(f"/v1/jobs/{job}")).status_code == 204
    assert await redis.exists(job_key(job)) == 0


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.GENERATING])
async def test_a_job_that_has_not_ended_stays(gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path, state: JobState) -> None:
    store = JobStore(redis)
    job = (await store.create(JobSpec(policy="demo"))).id
    if state != JobState.QUEUED:
        await store.advance(job, JobState.QUEUED, state)
    (tmp_path / "jobs" / job).mkdir(parents=True)
    reply = await gateway.delete(f"/v1/jobs/{job}")
    assert (reply.status_code, reply.json()["error"]["message"]) == (409, f"job {job} is {state}: cancel it first")
    with pytest.raises(Conflict, match="cancel it first"):
        await store.delete(job)
    assert (tmp_path / "jobs" / job).is_dir()


async def test_who_holds_a_message_of_a_deleted_job_can_change_nothing(
    gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path
) -> None:
    store = JobStore(redis)
    job = (await store.create(JobSpec(policy="demo"))).id
    await store.advance(job, JobState.QUEUED, JobState.GENERATING)
    await Queue(redis).put(PROMPTS, queued(job))
    (tmp_path / "jobs" / job).mkdir(parents=True)
    consumer = Consumer(redis, PROMPTS, model=PromptQueued)
    handed_on: list[bool] = []

    async def deletes_meanwhile(delivery: Delivery[PromptQueued]) -> None:
        await store.cancel(job)
        assert (await gateway.delete(f"/v1/jobs/{job}")).status_code == 204
        handed_on.append(await delivery.hand_on(CANDIDATES, messages(job)[CANDIDATES], counts={"sampled": 1}))
        await store.set_counts(job, 1, {"decided": 1})
        consumer.stop()

    await consumer.run(each(deletes_meanwhile))
    assert handed_on == [False]
    assert await lengths(redis) == [0] * 6
    assert (await redis.xpending(PROMPTS, GROUP))["pending"] == 0
    assert await redis.exists(job_key(job)) == 0
    with pytest.raises(NotFound):
        await store.delete(job)


async def test_a_training_ends_whose_job_was_cancelled_and_deleted_between_two_looks(
    redis: Redis, stages: Stages, adapter: Path
) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def endless(path: Path, tell: Tell) -> TrainMetrics:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    policies(stages, adapter)
    stages = replace(stages, run_training=endless)
    job = await submit(redis, stages)
    store = JobStore(redis)
    async with trainer(redis, stages):
        await decide(redis, job)
        async with asyncio.timeout(PATIENCE):
            await began.wait()
            await store.cancel(job.id)
            await store.delete(job.id)
            await ended.wait()
    assert await store.list() == []
