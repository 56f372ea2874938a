"""Dead messages: listed, put back over HTTP and from the command line, and what becomes of them. On a real queue server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner, Result

from gateway.app import create_app
from gateway.cli import app
from gateway.settings import GatewaySettings
from gateway.worker.generation import as_failed
from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.keys import CANDIDATES, CAPACITY, DECISIONS, PROMPTS, dead
from services.common.contract.messages import Message, PromptDecided, PromptQueued, PromptSampled
from services.common.queue import Consumer, DeadLetter, Delivery, Queue, connect, each
from services.trainer.decisions import DecisionLog
from sipo.errors import NotFound
from sipo.preferences import Example
from support import PATIENCE
from tests.fakes import FakeDecoder, write_policy_set
from tests.plans import sampling_plan
from tests.serving import in_a_thread

PLAN = sampling_plan(["concise", "warm"])
EXAMPLE = Example(prompt="A secret?", response_0="No.", response_1="Yes.", labels={"concise": 0, "warm": 1})


def queued(job: str, prompt: int = 0, round_: int = 1) -> PromptQueued:
    return PromptQueued(job=job, round=round_, prompt=str(prompt), example=EXAMPLE, plan=PLAN)


def sampled(job: str, prompt: int = 0, round_: int = 1) -> PromptSampled:
    return PromptSampled(queued=queued(job, prompt, round_), candidates=[])


def decided(job: str, prompt: int = 0) -> PromptDecided:
    return PromptDecided(job=job, round=1, prompt=str(prompt), outcome="none", example=EXAMPLE)


def build(redis: Redis, folder: Path) -> Any:
    write_policy_set(folder / "policies", "demo:1", ["concise", "warm"], current=True)
    decoder = httpx.AsyncClient(transport=httpx.ASGITransport(FakeDecoder().app), base_url="http://decoder")
    return create_app(GatewaySettings(data_dir=folder), decoder, redis)


@pytest.fixture
async def gateway(tmp_path: Path, redis: Redis) -> AsyncIterator[httpx.AsyncClient]:
    """The gateway without its lifespan: nothing is fed."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build(redis, tmp_path)), base_url="http://gateway") as client:
        yield client


async def in_state(redis: Redis, *states: JobState) -> Job:
    """A job that has gone through `states`."""
    store = JobStore(redis)
    job = await store.create(JobSpec(policy="demo"))
    for state in states:
        job = await store.advance(job.id, job.state, state)
    return job


async def generating(redis: Redis) -> str:
    return (await in_state(redis, JobState.GENERATING)).id


entries_of_the_dead = count(8)


async def bury(redis: Redis, stream: str, message: Message | str, reason: str = "NotFound: no policy set 'demo:1'") -> str:
    """Leaves a message as a consumer leaves one that has been tried enough; returns its entry, a later one each time."""
    data = message if isinstance(message, str) else message.model_dump_json()
    letter = DeadLetter(stream=stream, data=data, reason=reason, tries=3)
    entry = f"{next(entries_of_the_dead)}-0"
    await redis.xadd(dead(stream), {"data": letter.model_dump_json()}, id=entry)
    return entry


async def listed(gateway: httpx.AsyncClient, **query: str) -> list[dict[str, Any]]:
    reply = await gateway.get("/v1/queue/dead", params=query)
    assert reply.status_code == 200, reply.text
    messages: list[dict[str, Any]] = reply.json()["data"]
    return messages


async def requeued(gateway: httpx.AsyncClient, **wanted: Any) -> dict[str, Any]:
    reply = await gateway.post("/v1/queue/requeue", json=wanted)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await holds():  # noqa: ASYNC110, it is another's doing that makes it hold
            await asyncio.sleep(0.02)


async def test_a_prompt_that_died_in_the_scorer_is_put_back_and_its_decision_replaces_the_failed_one(
    gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path
) -> None:
    """Its reward set was missing, and is there again when the message is put back. Its neighbour's decision stays what it is."""
    job = await generating(redis)
    decision_log = DecisionLog(tmp_path)
    sets: set[str] = set()

    async def score(delivery: Delivery[PromptSampled]) -> None:
        message = delivery.message
        reward_set = message.queued.plan.reward_set
        if message.prompt == "0" and reward_set not in sets:
            raise NotFound(f"no policy set {reward_set!r}")
        await delivery.hand_on(DECISIONS, decided(message.job, int(message.prompt)))

    async def keep(delivery: Delivery[PromptDecided]) -> None:
        decision_log.append([delivery.message])
        await delivery.done()

    async def outcomes() -> dict[str, str]:
        return {decision.prompt: decision.outcome for decision in decision_log.read(1)}

    async def first_try() -> bool:
        return await outcomes() == {"0": "failed", "1": "none"}

    async def second_try() -> bool:
        return await outcomes() == {"0": "none", "1": "none"}

    for prompt in range(2):
        await Queue(redis).put(CANDIDATES, sampled(job, prompt))
    scorer = Consumer(
        redis,
        CANDIDATES,
        model=PromptSampled,
        max_tries=2,
        visibility=0.3,
        on_dead=lambda message, reason: as_failed(message.queued, reason),
    )
    async with AsyncExitStack() as running:
        await running.enter_async_context(scorer.running(each(score)))
        await running.enter_async_context(Consumer(redis, DECISIONS, model=PromptDecided).running(each(keep)))
        await until(first_try)
        [message] = await listed(gateway, job=job)
        assert (message["stream"], message["job"], message["round"], message["prompt"]) == ("candidates", job, 1, "0")
        assert "no policy set 'demo:1'" in message["reason"] and message["tries"] == 2
        assert (await gateway.get("/v1/queue")).json()["candidates"] == {"waiting": 0, "held": 0, "dead": 1}

        sets.add("demo:1")
        assert await requeued(gateway, entries=[message["entry"]]) == {"requeued": 1, "left": 0, "stayed": []}
        await until(second_try)
    assert decision_log.counts(1) == {"decided": 2, "accepted": 0, "none": 2, "failed": 0}
    assert await listed(gateway) == []


async def test_the_dead_are_listed_oldest_first_without_what_they_hold(gateway: httpx.AsyncClient, redis: Redis) -> None:
    first, second = [await generating(redis) for _ in range(2)]
    entries = [
        await bury(redis, DECISIONS, decided(first, 4)),
        await bury(redis, PROMPTS, "{", "not readable"),
        await bury(redis, CANDIDATES, queued(first), "not readable"),  # a message, but not of this stream
        await bury(redis, PROMPTS, queued(second, 7, round_=2)),
    ]
    messages = await listed(gateway)
    assert [message["entry"] for message in messages] == entries
    assert [(m["stream"], m["job"], m["round"], m["prompt"], m["tries"]) for m in messages] == [
        ("decisions", first, 1, "4", 3),
        ("prompts", None, None, None, 3),
        ("candidates", None, None, None, 3),
        ("prompts", second, 2, "7", 3),
    ]
    assert [message["reason"] for message in messages[1:]] == ["not readable"] * 2 + ["NotFound: no policy set 'demo:1'"]
    assert set(messages[0]) == {"stream", "entry", "job", "round", "prompt", "reason", "tries"}
    assert "secret" not in (await gateway.get("/v1/queue/dead")).text
    assert [message["entry"] for message in await listed(gateway, job=second)] == entries[3:]


async def test_the_queue_tells_how_many_wait_are_held_and_are_dead(gateway: httpx.AsyncClient, redis: Redis) -> None:
    nothing = {"waiting": 0, "held": 0, "dead": 0}
    assert (await gateway.get("/v1/queue")).json() == {"prompts": nothing, "candidates": nothing, "decisions": nothing}
    for prompt in range(3):
        await Queue(redis).put(PROMPTS, queued("job-1", prompt))
    await bury(redis, DECISIONS, decided("job-1"))
    took, may_end = asyncio.Event(), asyncio.Event()

    async def hold(_delivery: Delivery[PromptQueued]) -> None:
        took.set()
        await may_end.wait()

    async with Consumer(redis, PROMPTS, model=PromptQueued).running(each(hold)):
        await took.wait()
        depths = (await gateway.get("/v1/queue")).json()
        may_end.set()
    assert depths == {"prompts": {"waiting": 2, "held": 1, "dead": 0}, "candidates": nothing, "decisions": nothing | {"dead": 1}}


async def test_what_can_change_nothing_any_more_stays_and_the_reply_says_why(gateway: httpx.AsyncClient, redis: Redis) -> None:
    open_, next_round = await generating(redis), await in_state(redis, JobState.GENERATING)
    await JobStore(redis).update(next_round.id, round=2)
    training = await in_state(redis, JobState.GENERATING, JobState.TRAINING)
    cancelled = await in_state(redis, JobState.GENERATING, JobState.CANCELLED)
    staying = {
        await bury(redis, CANDIDATES, sampled(next_round.id)): f"round 1 of {next_round.id} is closed",
        await bury(redis, DECISIONS, decided(training.id)): f"round 1 of {training.id} is closed",
        await bury(redis, PROMPTS, queued(cancelled.id)): f"{cancelled.id} is cancelled",
        await bury(redis, PROMPTS, "{}"): "cannot be read",
        await bury(redis, PROMPTS, queued("job-lost")): "no job job-lost",
    }
    await bury(redis, PROMPTS, queued(open_))
    await bury(redis, DECISIONS, decided(open_, 1))
    await bury(redis, CANDIDATES, sampled(next_round.id, round_=2))

    answer = await requeued(gateway)
    assert (answer["requeued"], answer["left"]) == (3, 5)
    stayed = {message["entry"]: message["why"] for message in answer["stayed"]}
    assert stayed.keys() == staying.keys()
    assert all(words in stayed[entry] for entry, words in staying.items()), stayed
    assert {message["entry"] for message in await listed(gateway)} == staying.keys()
    for stream, message in (
        (PROMPTS, queued(open_)),
        (DECISIONS, decided(open_, 1)),
        (CANDIDATES, sampled(next_round.id, round_=2)),
    ):
        [(_, fields)] = await redis.xrange(stream)  # type: ignore[misc]
        assert fields == {"data": message.model_dump_json()}


async def test_only_what_matches_all_that_is_given_goes_back(gateway: httpx.AsyncClient, redis: Redis) -> None:
    first, second = [await generating(redis) for _ in range(2)]
    entries = [await bury(redis, CANDIDATES, sampled(first, prompt)) for prompt in range(3)]
    other_stream = await bury(redis, PROMPTS, queued(first, 9))
    other_job = await bury(redis, CANDIDATES, sampled(second))

    async def left() -> list[str]:
        return [message["entry"] for message in await listed(gateway)]

    assert (await requeued(gateway, stream="decisions"))["requeued"] == 0
    assert (await requeued(gateway, entries=[entries[1]]))["requeued"] == 1
    assert await left() == [entries[0], entries[2], other_stream, other_job]
    assert (await requeued(gateway, stream="candidates", job=first))["requeued"] == 2
    assert await left() == [other_stream, other_job]
    assert (await requeued(gateway, job=second, entries=[other_job]))["requeued"] == 1
    assert await left() == [other_stream]


async def test_a_mistake_is_named_and_moves_nothing(gateway: httpx.AsyncClient, redis: Redis) -> None:
    job, other = [await generating(redis) for _ in range(2)]
    entry = await bury(redis, CANDIDATES, sampled(job))
    for wanted, status, param, words in (
        ({"stream": "sipo:candidates"}, 400, "stream", "'prompts', 'candidates' or 'decisions'"),
        ({"entries": [entry, "1-1"]}, 404, "entries", ": 1-1;"),
        ({"entries": [entry], "job": other}, 404, "entries", entry),
        ({"entries": [entry], "stream": "prompts"}, 404, "entries", entry),
        ({"entries": []}, 400, "entries", "at least 1"),
        ({"job": "nobody"}, 404, None, "'nobody'"),
        ({"jobs": [job]}, 400, "jobs", "not permitted"),
    ):
        reply = await gateway.post("/v1/queue/requeue", json=wanted)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (status, param), reply.text
        assert words in error["message"]
    assert (await gateway.get("/v1/queue/dead", params={"job": "nobody"})).status_code == 404
    assert [message["entry"] for message in await listed(gateway)] == [entry]


async def test_an_entry_that_two_streams_have_needs_its_stream(gateway: httpx.AsyncClient, redis: Redis) -> None:
    job = await generating(redis)
    entry = await bury(redis, PROMPTS, queued(job))
    await redis.xadd(dead(CANDIDATES), {"data": (await redis.xrange(dead(PROMPTS)))[0][1]["data"]}, id=entry)  # type: ignore[index]
    reply = await gateway.post("/v1/queue/requeue", json={"entries": [entry]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream")
    assert (await requeued(gateway, entries=[entry], stream="prompts"))["requeued"] == 1
    assert [message["stream"] for message in await listed(gateway)] == ["candidates"]


async def test_what_finds_no_room_stays_dead(gateway: httpx.AsyncClient, redis: Redis) -> None:
    job = await generating(redis)
    full = redis.pipeline()
    for prompt in range(CAPACITY - 1):
        full.xadd(PROMPTS, {"data": queued(job, prompt).model_dump_json()})
    await full.execute()
    _, second = [await bury(redis, PROMPTS, queued(job, CAPACITY + prompt)) for prompt in range(2)]
    answer = await requeued(gateway)
    assert (answer["requeued"], answer["left"]) == (1, 1)
    assert answer["stayed"][0] == {"stream": "prompts", "entry": second} | {"why": answer["stayed"][0]["why"]}
    assert "no room in prompts" in answer["stayed"][0]["why"]
    await redis.xtrim(PROMPTS, maxlen=0)
    assert await requeued(gateway) == {"requeued": 1, "left": 0, "stayed": []}


@pytest.fixture
def url(tmp_path: Path, redis_url: str) -> Iterator[str]:
    """A gateway for the commands, which block."""
    client = connect(redis_url)
    with in_a_thread(build(client, tmp_path), lifespan="off", within=client) as url:  # without a lifespan nobody else closes it
        yield url


def sipo(url: str, *args: str) -> Result:
    return CliRunner().invoke(app, ["queue", *args], env={"SIPO_GATEWAY_URL": url})


async def test_the_command_line_shows_the_dead_and_puts_them_back(url: str, redis: Redis) -> None:
    first, second = [await generating(redis) for _ in range(2)]
    long = f"NotFound: no policy set 'demo:1' [of {'many ' * 30}]"
    entry = await bury(redis, CANDIDATES, sampled(first, 3), long)
    unreadable = await bury(redis, PROMPTS, "{", "not readable")
    other = await bury(redis, CANDIDATES, sampled(second, 5))

    lines = sipo(url, "show").stdout.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["stream", "waiting", "held", "dead"],
        ["prompts", "0", "0", "1"],
        ["candidates", "0", "0", "2"],
        ["decisions", "0", "0", "0"],
    ]
    assert lines[4] == f"candidates {entry} {first}/1/3, 3 tries: {long}"
    assert lines[5] == f"prompts {unreadable} unreadable, 3 tries: not readable"
    assert [line.split()[1] for line in sipo(url, "show", "--job", second).stdout.splitlines()[4:]] == [other]

    assert sipo(url, "requeue", "--job", first, "--stream", "candidates").stdout == "1 went back, 0 stayed\n"
    assert sipo(url, "requeue", other).stdout == "1 went back, 0 stayed\n"
    result = sipo(url, "requeue")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "0 went back, 1 stayed",
        f"prompts {unreadable}: it cannot be read, so it would only die again",
    ]
    assert await redis.xlen(CANDIDATES) == 2


async def test_mistakes_on_the_command_line_get_one_sentence_and_exit_2(url: str, redis: Redis) -> None:
    await bury(redis, PROMPTS, queued(await generating(redis)))
    for args, words in (
        (["requeue", "1-1"], "1-1"),
        (["requeue", "--stream", "nowhere"], "'prompts', 'candidates' or 'decisions'"),
        (["requeue", "--job", ""], "no job ''"),  # an unset variable of a script does not mean all
        (["show", "--job", "no&body"], "no job 'no&body'"),
    ):
        result = sipo(url, *args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr and result.stderr.count("\n") == 1
    assert await redis.xlen(dead(PROMPTS)) == 1
