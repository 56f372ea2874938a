"""The generation worker on a real queue: the real reviewer, and a decoder that writes by rule."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from redis.asyncio import Redis

from gateway.worker.app import create_app
from gateway.worker.settings import WorkerSettings
from services.common.contract.keys import CANDIDATES, DECISIONS, PROMPTS, dead
from services.common.contract.messages import Message, PromptDecided, PromptQueued, PromptSampled
from services.common.queue import Queue, connect
from services.common.web.clients import DecoderClient, ReviewerClient
from services.reviewer.app import create_app as create_reviewer
from services.reviewer.settings import ReviewerSettings
from sipo.preferences import Example, format_weights, sampling_weights
from support import PATIENCE
from tests.fakes import WritingDecoder, write_policy_set
from tests.plans import sampling_plan

OBJECTIVES = ["concise", "warm"]

M = TypeVar("M", bound=Message)


def queued(prompt: int, **plan: object) -> PromptQueued:
    example = Example(prompt=f"What is {prompt}?", response_0="no", response_1="yes", labels={"concise": 1, "warm": 0})
    usual = {
        "weights": sampling_weights(OBJECTIVES),
        "review_weights": {"concise": 1.0, "warm": 0.0},
        "samples_per_weight": 2,
    }
    return PromptQueued(job="job-1", round=1, prompt=str(prompt), example=example, plan=sampling_plan(OBJECTIVES, **usual | plan))


@pytest.fixture
def decoder() -> WritingDecoder:
    return WritingDecoder()


Start = Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def start(data_dir: Path, tiny_base: Path, redis: Redis, redis_url: str, decoder: WritingDecoder) -> Start:
    """Runs a worker, with a reviewer of its own, for the time of the body."""
    write_policy_set(data_dir / "policies", "demo:1", OBJECTIVES)

    @asynccontextmanager
    async def start() -> AsyncIterator[httpx.AsyncClient]:
        to_decoder = httpx.ASGITransport(decoder.app)
        settings = ReviewerSettings(data_dir=data_dir, model=str(tiny_base))
        reviewer = create_reviewer(settings, DecoderClient("http://decoder", transport=to_decoder))
        app = create_app(
            WorkerSettings(data_dir=data_dir, worker_prompts=2),
            connect(redis_url),
            DecoderClient("http://decoder", transport=to_decoder),
            ReviewerClient("http://reviewer", transport=httpx.ASGITransport(reviewer)),
        )
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://w") as me,
        ):
            yield me

    return start


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110, what is awaited is in the queue server
            await asyncio.sleep(0.02)


async def messages(redis: Redis, stream: str, model: type[M]) -> list[M]:
    return [model.model_validate_json(fields["data"]) for _, fields in await redis.xrange(stream)]


async def test_a_prompt_goes_on_with_a_sample_and_a_rewrite_for_every_weight_and_repetition(start: Start, redis: Redis) -> None:
    for prompt in range(3):
        await Queue(redis).put(PROMPTS, queued(prompt))
    async with start() as worker:
        await until(lambda: _length(redis, CANDIDATES, 3))
        assert (await worker.get("/ready")).status_code == 200
    sampled = await messages(redis, CANDIDATES, PromptSampled)
    assert sorted(one.id for one in sampled) == ["job-1/1/0", "job-1/1/1", "job-1/1/2"]
    for one in sampled:
        made = Counter((candidate.stage, format_weights(candidate.weights)) for candidate in one.candidates)
        assert made == {(stage, format_weights(w)): 2 for stage in ("sample", "rewrite") for w in sampling_weights(OBJECTIVES)}
        assert len({candidate.text for candidate in one.candidates}) == len(one.candidates)
        assert all(bool(candidate.review) == (candidate.stage == "rewrite") for candidate in one.candidates)
    assert await redis.xlen(PROMPTS) == 0


@pytest.mark.parametrize("mode", ["mod", "soup"])
async def test_each_stage_runs_under_its_own_weights(start: Start, redis: Redis, decoder: WritingDecoder, mode: str) -> None:
    weights = {"concise": 0.2, "warm": 0.8}
    await Queue(redis).put(PROMPTS, queued(0, weights=[weights], samples_per_weight=1, mode=mode))
    async with start():
        await until(lambda: _length(redis, CANDIDATES, 1))
    sample, review, rewrite = decoder.bodies
    assert sample["messages"] == [{"role": "user", "content": "What is 0?"}]
    assert [body["preference_weights"] for body in (sample, review, rewrite)] == [weights, {"concise": 1.0, "warm": 0.0}, weights]
    assert [body["mode"] for body in (sample, review, rewrite)] == [mode] * 3
    assert [body["max_tokens"] for body in (sample, review, rewrite)] == [32, 16, 32]
    assert len({body["seed"] for body in (sample, review, rewrite)}) == 3
    [message] = await messages(redis, CANDIDATES, PromptSampled)
    drafted, rewritten = message.candidates
    assert drafted.text in review["messages"][-1]["content"]
    assert drafted.text in rewrite["messages"][-1]["content"]
    assert rewritten.review
    assert rewritten.review in rewrite["messages"][-1]["content"]


async def test_without_refinement_there_are_samples_only(start: Start, redis: Redis) -> None:
    await Queue(redis).put(PROMPTS, queued(0, refine=False))
    async with start():
        await until(lambda: _length(redis, CANDIDATES, 1))
    [message] = await messages(redis, CANDIDATES, PromptSampled)
    assert [candidate.stage for candidate in message.candidates] == ["sample"] * 8


async def test_a_redelivery_makes_the_same_candidates(start: Start, redis: Redis) -> None:
    for seed in (0, 0, 1):
        await Queue(redis).put(PROMPTS, queued(0, seed=seed))
    async with start():
        await until(lambda: _length(redis, CANDIDATES, 3))
    made = Counter(message.model_dump_json(include={"candidates"}) for message in await messages(redis, CANDIDATES, PromptSampled))
    assert sorted(made.values()) == [1, 2]


@pytest.mark.slow
async def test_a_decoder_that_is_away_costs_no_try(start: Start, redis: Redis, decoder: WritingDecoder) -> None:
    decoder.error = (503, {"error": {"message": "loading the model"}})
    await Queue(redis).put(PROMPTS, queued(0))
    async with start():
        await until(lambda: _asked(decoder, 5 * 8))  # more often than a message may be tried
        decoder.error = None
        await until(lambda: _length(redis, CANDIDATES, 1))
    assert await redis.xlen(dead(PROMPTS)) == 0


@pytest.mark.slow
async def test_a_prompt_that_the_decoder_refuses_is_decided_as_failed(start: Start, redis: Redis, decoder: WritingDecoder) -> None:
    decoder.error = (400, {"error": {"message": "the prompt is too long"}})
    await Queue(redis).put(PROMPTS, queued(0))
    async with start():
        await until(lambda: _length(redis, DECISIONS, 1))
    [decision] = await messages(redis, DECISIONS, PromptDecided)
    assert (decision.outcome, decision.id, decision.candidates) == ("failed", "job-1/1/0", [])
    assert "the prompt is too long" in (decision.error or "")
    assert await redis.xlen(CANDIDATES) == 0


async def _length(redis: Redis, stream: str, length: int) -> bool:
    return await redis.xlen(stream) >= length


async def _asked(decoder: WritingDecoder, times: int) -> bool:
    return len(decoder.bodies) >= times
