"""The queue's promises, against a real Valkey."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import pytest
from redis.asyncio import Redis

from services.common.contract.job_store import JobStore
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.keys import CANDIDATES, DECISIONS, GROUP, PROMPTS, dead, job_key
from services.common.contract.messages import Message, PromptDecided, PromptQueued, PromptSampled
from services.common.local.valkey import server, server_argv
from services.common.queue import Consumer, DeadLetter, Delivery, Queue, connect, consuming, each
from services.common.queue.streams import Depth
from sipo.errors import Conflict, InvalidRequest, Unavailable
from sipo.preferences import Example
from support import PATIENCE
from tests.plans import sampling_plan

PLAN = sampling_plan()
MODELS: dict[str, type[Message]] = {PROMPTS: PromptQueued, CANDIDATES: PromptSampled, DECISIONS: PromptDecided}

M = TypeVar("M", bound=Message)


def queued(prompt: int, job: str = "job-1") -> PromptQueued:
    example = Example(prompt=f"prompt {prompt}", response_0="no", response_1="yes", labels={"a": 1, "b": 0})
    return PromptQueued(job=job, round=1, prompt=str(prompt), example=example, plan=PLAN)


def sampled(message: PromptQueued) -> PromptSampled:
    return PromptSampled(queued=message, candidates=[])


def as_failed(message: PromptQueued, reason: str) -> tuple[str, PromptDecided]:
    decision = PromptDecided(
        job=message.job, round=message.round, prompt=message.prompt, outcome="failed", example=message.example, error=reason
    )
    return DECISIONS, decision


def consumer(redis: Redis, **options: Any) -> Consumer[PromptQueued]:
    """Its heart may beat late on a busy machine: where others could take over what it holds, it has a longer `visibility`."""
    return Consumer(redis, PROMPTS, model=PromptQueued, **({"visibility": 0.3, "linger": 0.05} | options))


async def hand_on(batch: list[Delivery[PromptQueued]]) -> None:
    for delivery in batch:
        await delivery.hand_on(CANDIDATES, sampled(delivery.message), counts={"sampled": 1})


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110, it is another process that makes it hold
            await asyncio.sleep(0.02)


async def messages_in(redis: Redis, stream: str, model: type[M]) -> list[M]:
    entries = cast(list[tuple[str, dict[str, str]]], await redis.xrange(stream))
    return [model.model_validate_json(fields["data"]) for _, fields in entries]


async def prompts_in(redis: Redis, stream: str) -> Counter[str]:
    return Counter(message.prompt for message in await messages_in(redis, stream, MODELS[stream]))


async def length(redis: Redis, stream: str, number: int) -> None:
    async def has() -> bool:
        return await redis.xlen(stream) == number

    await until(has)


async def held(redis: Redis) -> tuple[str, str, float]:
    """The one prompt that is held: its entry, its holder, and the seconds since the last sign of life."""
    (pending,) = await redis.xpending_range(PROMPTS, GROUP, "-", "+", 2)
    return pending["message_id"], pending["consumer"], pending["time_since_delivered"] / 1000


async def pass_without_heartbeat(redis: Redis, seconds: float) -> None:
    """Puts the server's clock of the one prompt that is held forward."""
    entry, holder, _ = await held(redis)
    await redis.xclaim(PROMPTS, GROUP, holder, 0, [entry], idle=int(1000 * seconds), justid=True)


async def test_a_handed_over_message_is_in_the_next_stream_and_nowhere_else(redis: Redis) -> None:
    for i in range(5):
        await Queue(redis).put(PROMPTS, queued(i))
    sizes: list[int] = []

    async def handle(batch: list[Delivery[PromptQueued]]) -> None:
        sizes.append(len(batch))
        await hand_on(batch)

    async with consumer(redis, batch=3).running(handle):
        await length(redis, CANDIDATES, 5)
        await length(redis, PROMPTS, 0)
    assert sizes == [3, 2]
    assert await prompts_in(redis, CANDIDATES) == Counter("01234")
    assert await redis.hget(job_key("job-1"), "count:1:sampled") == "5"
    assert await redis.xinfo_consumers(PROMPTS, "sipo") == [], "a consumer that holds nothing leaves no trace"


async def test_a_batch_lingers_for_messages_that_come_a_little_later(redis: Redis) -> None:
    sizes: list[int] = []

    async def handle(batch: list[Delivery[PromptQueued]]) -> None:
        sizes.append(len(batch))
        await hand_on(batch)

    async def taken(number: int) -> bool:
        return (await Queue(redis).depths())[PROMPTS].held == number

    async with consumer(redis, batch=3, linger=4).running(handle):
        for i in range(2):
            await Queue(redis).put(PROMPTS, queued(i))
            await until(partial(taken, i + 1))
        await Queue(redis).put(PROMPTS, queued(2))
        await length(redis, CANDIDATES, 3)
    assert sizes == [3]


async def test_a_slow_handler_keeps_its_message_by_heartbeats(redis: Redis) -> None:
    """It works for twice as long as another would wait before taking the message over."""
    await Queue(redis).put(PROMPTS, queued(0))
    taken, may_end = asyncio.Event(), asyncio.Event()
    calls = 0

    async def slow(batch: list[Delivery[PromptQueued]]) -> None:
        nonlocal calls
        calls += 1
        taken.set()
        await may_end.wait()
        await hand_on(batch)

    async def heartbeat() -> bool:
        return (await held(redis))[2] < 20

    async with consumer(redis).running(slow):
        await taken.wait()
        async with consumer(redis, visibility=30).running(slow):
            for _ in range(3):
                await pass_without_heartbeat(redis, 20)
                await until(heartbeat)
            may_end.set()
            await length(redis, CANDIDATES, 1)
    assert calls == 1


KILLED = """
import asyncio, sys
from services.common.contract.keys import PROMPTS
from services.common.contract.messages import PromptQueued
from services.common.queue import Consumer, connect
async def handle(batch):
    print(len(batch), flush=True)
    await asyncio.sleep(60)
asyncio.run(Consumer(connect(sys.argv[1]), PROMPTS, model=PromptQueued, batch=4, linger=1, visibility=0.5).run(handle))
"""


async def test_what_a_killed_consumer_held_is_handled_by_another_once(redis: Redis, redis_url: str) -> None:
    for i in range(4):
        await Queue(redis).put(PROMPTS, queued(i))
    victim = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, redis_url, stdout=asyncio.subprocess.PIPE)
    assert victim.stdout
    assert await victim.stdout.readline() == b"4\n"
    victim.kill()
    await victim.wait()
    tries: list[int] = []

    async def handle(batch: list[Delivery[PromptQueued]]) -> None:
        tries.append(*[delivery.tries for delivery in batch])  # those that a crash touched come one at a time
        await hand_on(batch)

    async with consumer(redis, batch=4, visibility=0.5).running(handle):
        await length(redis, CANDIDATES, 4)
    assert tries == [2, 2, 2, 2]
    assert await prompts_in(redis, CANDIDATES) == Counter("0123")
    await Queue(redis).forget_absent(absent=0)
    assert await redis.xinfo_consumers(PROMPTS, "sipo") == []


async def test_a_stalled_consumer_cannot_commit_what_another_has_taken_over(redis: Redis) -> None:
    await Queue(redis).put(PROMPTS, queued(0))
    taken, resume = asyncio.Event(), asyncio.Event()
    outcome: list[bool] = []

    async def stall(batch: list[Delivery[PromptQueued]]) -> None:
        taken.set()
        await resume.wait()
        outcome.append(await batch[0].hand_on(CANDIDATES, sampled(batch[0].message), counts={"sampled": 1}))

    stalled = consumer(redis, visibility=30)
    stalled._beat = lambda: asyncio.sleep(60)  # type: ignore[method-assign]  # a process that the system has stopped
    async with stalled.running(stall):
        await taken.wait()
        await pass_without_heartbeat(redis, 30)
        async with consumer(redis, visibility=30).running(hand_on):
            await length(redis, CANDIDATES, 1)
        resume.set()
        await until(lambda: asyncio.sleep(0, bool(outcome)))
    assert outcome == [False]
    assert await prompts_in(redis, CANDIDATES) == Counter("0")
    assert await redis.hget(job_key("job-1"), "count:1:sampled") == "1"


async def test_a_poisonous_message_goes_to_the_dead_and_takes_no_neighbour_with_it(redis: Redis) -> None:
    for i in range(4):
        await Queue(redis).put(PROMPTS, queued(i))

    async def handle(batch: list[Delivery[PromptQueued]]) -> None:
        if any(delivery.message.prompt == "2" for delivery in batch):
            raise InvalidRequest("no answer to 2")
        await hand_on(batch)

    async with consumer(redis, batch=4, on_dead=as_failed).running(handle):
        await length(redis, DECISIONS, 1)
        await length(redis, CANDIDATES, 3)
    assert await prompts_in(redis, CANDIDATES) == Counter("013")
    ((_, letter),) = await Queue(redis).dead(PROMPTS)
    assert (letter.stream, letter.tries, letter.reason) == (PROMPTS, 3, "invalid_request: no answer to 2")
    assert PromptQueued.model_validate_json(letter.data) == queued(2)
    (decision,) = await messages_in(redis, DECISIONS, PromptDecided)
    assert (decision.id, decision.outcome, decision.error) == ("job-1/1/2", "failed", "invalid_request: no answer to 2")


CRASHES = """
import asyncio, os, sys
from services.common.contract.keys import CANDIDATES, PROMPTS
from services.common.contract.messages import PromptQueued, PromptSampled
from services.common.queue import Consumer, connect
async def handle(batch):
    if any(d.message.prompt == "1" for d in batch):
        os._exit(9)
    for d in batch:
        await d.hand_on(CANDIDATES, PromptSampled(queued=d.message, candidates=[]))
consumer = Consumer(connect(sys.argv[1]), PROMPTS, model=PromptQueued, batch=4, linger=0.5, visibility=0.3, max_tries=2)
asyncio.run(consumer.run(handle))
"""


@pytest.mark.slow
async def test_a_message_that_crashes_its_consumers_dies_alone(redis: Redis, redis_url: str) -> None:
    for i in range(4):
        await Queue(redis).put(PROMPTS, queued(i))
    for _ in range(2):
        crashed = await asyncio.create_subprocess_exec(sys.executable, "-c", CRASHES, redis_url)
        assert await crashed.wait() == 9
    async with consumer(redis, max_tries=2).running(hand_on):
        await length(redis, dead(PROMPTS), 1)
        await length(redis, CANDIDATES, 3)
    assert await prompts_in(redis, CANDIDATES) == Counter("023")
    ((_, letter),) = await Queue(redis).dead(PROMPTS)
    assert letter.reason == "each of 2 tries ended with its consumer's death"


async def test_a_message_that_cannot_be_read_is_dead_at_once_and_whole(redis: Redis) -> None:
    await redis.xadd(PROMPTS, {"data": '{"version": 7}'})
    await Queue(redis).put(PROMPTS, queued(1))
    async with consumer(redis).running(hand_on):
        await length(redis, CANDIDATES, 1)
    ((_, letter),) = await Queue(redis).dead(PROMPTS)
    assert letter.data == '{"version": 7}'
    assert letter.reason.startswith("not readable as PromptQueued: version:")
    assert await redis.xlen(PROMPTS) == 0


async def test_a_dead_message_of_another_release_is_refused_and_one_without_a_version_read(redis: Redis) -> None:
    letter = DeadLetter(stream=PROMPTS, data="{}", reason="not readable", tries=1)
    await redis.xadd(dead(PROMPTS), {"data": letter.model_dump_json(exclude={"version"})})
    assert [found for _, found in await Queue(redis).dead(PROMPTS)] == [letter]
    await redis.xadd(dead(PROMPTS), {"data": json.dumps({**letter.model_dump(), "version": 2})})
    with pytest.raises(Conflict, match="DeadLetter sipo:prompts was written by another release: its version is 2, this one reads"):
        await Queue(redis).dead(PROMPTS)


async def test_unavailable_hands_back_uncounted_and_waits(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.queue.consumer.UNAVAILABLE_WAIT", (0.05, 0.2))
    await Queue(redis).put(PROMPTS, queued(0))
    await Queue(redis).put(PROMPTS, queued(1))
    seen: list[tuple[float, list[int]]] = []
    clock = asyncio.get_running_loop().time

    async def handle(batch: list[Delivery[PromptQueued]]) -> None:
        seen.append((clock(), [delivery.tries for delivery in batch]))
        if len(seen) < 6:  # twice as often as it may be tried
            raise Unavailable("the decoder sleeps")
        await hand_on(batch)

    async with consumer(redis, batch=2).running(handle):
        await length(redis, CANDIDATES, 2)
    assert [tries for _, tries in seen] == [[1, 1]] * 6, "released messages stay together and untried"
    waits = [later - earlier for (earlier, _), (later, _) in pairwise(seen)]
    assert all(wait >= least for wait, least in zip(waits, (0.05, 0.1, 0.2, 0.2, 0.2), strict=True))
    assert await Queue(redis).dead(PROMPTS) == []


async def test_each_gives_every_delivery_its_own_end(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.queue.consumer.UNAVAILABLE_WAIT", (0.05, 0.2))
    for i in range(3):
        await Queue(redis).put(PROMPTS, queued(i))
    seen: Counter[str] = Counter()

    async def handle(delivery: Delivery[PromptQueued]) -> None:
        prompt = delivery.message.prompt
        seen[prompt] += 1
        if prompt == "1" and seen[prompt] == 1:
            raise Unavailable("asleep")
        if prompt == "2":
            raise ValueError("never")
        await delivery.hand_on(CANDIDATES, sampled(delivery.message))

    async with consumer(redis, batch=3, max_tries=2).running(each(handle)):
        await length(redis, dead(PROMPTS), 1)
        await length(redis, CANDIDATES, 2)
    assert seen == {"0": 1, "1": 2, "2": 2}
    ((_, letter),) = await Queue(redis).dead(PROMPTS)
    assert letter.reason == "ValueError: never"


async def test_an_error_after_the_hand_over_undoes_nothing(redis: Redis) -> None:
    for i in range(2):
        await Queue(redis).put(PROMPTS, queued(i))
    handled: list[str] = []

    async def handle(delivery: Delivery[PromptQueued]) -> None:
        handled.append(delivery.message.prompt)
        await delivery.hand_on(CANDIDATES, sampled(delivery.message))
        raise ValueError("too late")

    async with consumer(redis).running(each(handle)):
        await length(redis, CANDIDATES, 2)
    assert handled == ["0", "1"]
    assert await redis.xlen(PROMPTS) == await redis.xlen(dead(PROMPTS)) == 0


async def test_a_full_stream_makes_producer_and_consumer_wait(redis: Redis) -> None:
    queue = Queue(redis, capacity=2)
    for i in range(2):
        await queue.put(PROMPTS, queued(i))
    waiting = asyncio.create_task(queue.put(PROMPTS, queued(2)))
    await asyncio.wait([waiting], timeout=0.3)
    assert not waiting.done()
    meets_no_room, no_room = consumer(redis, capacity=2), asyncio.Event()

    async def pause(_seconds: float) -> None:
        no_room.set()
        await asyncio.sleep(0.02)

    meets_no_room._pause = pause  # type: ignore[method-assign]
    async with meets_no_room.running(hand_on):
        await waiting
        await no_room.wait()
        assert await queue.depths() == {PROMPTS: Depth(0, 1, 0), CANDIDATES: Depth(2, 0, 0), DECISIONS: Depth(0, 0, 0)}
        await redis.xtrim(CANDIDATES, maxlen=0)
        await length(redis, CANDIDATES, 1)
    assert await prompts_in(redis, CANDIDATES) == Counter("2")


async def test_stopping_finishes_the_batch_and_leaves_the_rest(redis: Redis) -> None:
    for i in range(3):
        await Queue(redis).put(PROMPTS, queued(i))
    begun = asyncio.Event()
    stopped = consumer(redis, batch=2)

    async def handle(batch: list[Delivery[PromptQueued]]) -> None:
        begun.set()
        await stopped._stopping.wait()
        await hand_on(batch)

    async with stopped.running(handle):
        await begun.wait()
    assert await prompts_in(redis, CANDIDATES) == Counter("01")
    assert await prompts_in(redis, PROMPTS) == Counter("2")


async def test_a_batch_that_takes_longer_than_the_grace_is_handed_back_uncounted(redis: Redis) -> None:
    await Queue(redis).put(PROMPTS, queued(0))
    begun = asyncio.Event()
    tries: list[int] = []

    async def forever(batch: list[Delivery[PromptQueued]]) -> None:
        begun.set()
        await asyncio.sleep(60)

    async def note(batch: list[Delivery[PromptQueued]]) -> None:
        tries.extend(delivery.tries for delivery in batch)
        await hand_on(batch)

    async with consumer(redis, visibility=30).running(forever, grace=0.1):
        await begun.wait()
    async with consumer(redis, visibility=30).running(note):
        await length(redis, CANDIDATES, 1)
    assert tries == [1]


async def test_consumers_of_one_process_work_side_by_side_and_stop_together(redis: Redis) -> None:
    for i in range(4):
        await Queue(redis).put(PROMPTS, queued(i))
    clock = asyncio.get_running_loop().time
    at_work, at_their_end = asyncio.Barrier(3 + 1), asyncio.Barrier(3)
    taken, ended = 0, []

    async def forever(batch: list[Delivery[PromptQueued]]) -> None:
        nonlocal taken
        taken += 1
        await at_work.wait()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            await at_their_end.wait()  # were each given a grace of its own, the first would wait in vain
            ended.append(clock())

    async with consuming([consumer(redis, visibility=30) for _ in range(3)], forever, grace=0.5):
        await asyncio.wait_for(at_work.wait(), PATIENCE)
        begin = clock()
    assert taken == len(ended) == 3, "nobody takes another while stopping"
    assert min(ended) - begin >= 0.5


async def test_a_consumer_that_dies_of_a_bug_ends_the_process(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", sent.append)
    broken = consumer(redis)
    monkeypatch.setattr(broken, "_take", lambda: asyncio.sleep(0, None))
    async with broken.running(hand_on):
        await until(lambda: asyncio.sleep(0, bool(sent)))
    assert sent == [signal.SIGTERM]


async def generating(redis: Redis) -> str:
    jobs = JobStore(redis)
    job = await jobs.create(JobSpec(policy="demo"))
    await jobs.advance(job.id, JobState.QUEUED, JobState.GENERATING)
    return job.id


async def test_messages_of_a_cancelled_job_are_dropped_when_taken_and_when_handed_over(redis: Redis) -> None:
    job = await generating(redis)
    queue = Queue(redis)
    assert await queue.feed(queued(0, job), 0) == "fed"
    assert await queue.feed(queued(1, job), 1) == "fed"
    seen: list[str] = []
    outcome: list[bool] = []

    async def cancel_meanwhile(batch: list[Delivery[PromptQueued]]) -> None:
        seen.extend(delivery.message.prompt for delivery in batch)
        await JobStore(redis).cancel(job)
        outcome.append(await batch[0].hand_on(CANDIDATES, sampled(batch[0].message), counts={"sampled": 1}))

    async with consumer(redis).running(cancel_meanwhile):
        await length(redis, PROMPTS, 0)
    assert seen == ["0"]
    assert outcome == [False]
    assert await redis.xlen(CANDIDATES) == 0
    assert (await JobStore(redis).get(job)).counts.sampled == 0


async def test_many_feeders_feed_each_prompt_once_and_in_order(redis: Redis) -> None:
    job = await generating(redis)
    queue = Queue(redis, capacity=30)

    async def feeder() -> None:
        while (position := (await JobStore(redis).get(job)).counts.queued) < 20:
            assert await queue.feed(queued(position, job), position) in ("fed", "moved")

    await asyncio.gather(*(feeder() for _ in range(4)))
    assert [message.id for message in await messages_in(redis, PROMPTS, PromptQueued)] == [f"{job}/1/{i}" for i in range(20)]


async def test_feeding_says_why_it_did_not(redis: Redis) -> None:
    job = await generating(redis)
    queue = Queue(redis, capacity=1)
    assert await queue.feed(queued(0, job), 0) == "fed"
    assert await queue.feed(queued(0, job), 0) == "moved"
    assert await queue.feed(queued(1, job), 1) == "full"
    await JobStore(redis).cancel(job)
    assert await queue.feed(queued(1, job), 1) == "closed"
    assert await redis.xlen(PROMPTS) == 1


async def test_dead_messages_can_be_put_back(redis: Redis) -> None:
    for i in range(2):
        await Queue(redis).put(PROMPTS, queued(i))

    async def refuse(batch: list[Delivery[PromptQueued]]) -> None:
        raise InvalidRequest("no")

    async with consumer(redis, max_tries=1).running(refuse):
        await length(redis, dead(PROMPTS), 2)
    (first, _), _ = await Queue(redis).dead(PROMPTS)
    assert await Queue(redis).requeue(PROMPTS, [first]) == 1
    assert await Queue(redis).requeue(PROMPTS) == 1
    assert await Queue(redis).requeue(PROMPTS) == 0
    async with consumer(redis, max_tries=1).running(hand_on):
        await length(redis, CANDIDATES, 2)
    assert await prompts_in(redis, CANDIDATES) == Counter("01")


@pytest.mark.slow
async def test_messages_and_claims_survive_the_death_of_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SIGKILL in the middle of a batch: the consumer waits for the server, and what it held is still its own."""
    folder = tmp_path_factory.mktemp("dying")
    with server(folder) as url:
        client = connect(url)
        port = int(url.rsplit(":", 1)[1])
        pid = (await client.info("server"))["process_id"]
        await Queue(client).put(PROMPTS, queued(0))
        await Queue(client).put(PROMPTS, queued(1))
        tries: list[int] = []

        async def handle(batch: list[Delivery[PromptQueued]]) -> None:
            tries.extend(delivery.tries for delivery in batch)
            if len(tries) == 1:
                os.kill(pid, signal.SIGKILL)
                await until(port_is_free)
                revived.append(await asyncio.create_subprocess_exec(*server_argv(folder, port), stdout=asyncio.subprocess.DEVNULL))
            await hand_on(batch)

        async def port_is_free() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return True
            writer.close()
            return False

        revived: list[asyncio.subprocess.Process] = []
        try:
            async with consumer(client, visibility=10).running(handle):
                await until(lambda: asyncio.sleep(0, len(tries) == 2))
                await length(client, CANDIDATES, 2)
            assert tries == [1, 1]
            assert await prompts_in(client, CANDIDATES) == Counter("01")
        finally:
            await client.aclose()
            for process in revived:
                process.terminate()
                await process.wait()
