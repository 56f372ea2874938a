"""The decoder sleeps while policies are trained: who waits for whom, and what its callers are told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from gateway.app import create_app as create_gateway
from gateway.settings import GatewaySettings
from services.common.clients import DecoderClient
from services.common.tasks import end_tasks
from services.decoder.residency import ResidentSets
from services.decoder.settings import DecoderSettings
from services.decoder.sleeping import Sleeper
from sipo.errors import Unavailable
from tests.fakes import FakeEngine, client_of, served

ASK = {"model": "base", "prompt": "Hi"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def sleeper(engine: FakeEngine) -> AsyncIterator[Sleeper]:
    sleeper = Sleeper(engine, ResidentSets(engine, 2))
    running = asyncio.create_task(sleeper.run())
    yield sleeper
    await end_tasks(running)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  # looks as a person would
            await asyncio.sleep(0.001)


def refuses(sleeper: Sleeper) -> bool:
    try:
        with sleeper.completion():
            return False
    except Unavailable:
        return True


async def test_all_that_runs_ends_before_the_engine_sleeps(sleeper: Sleeper, engine: FakeEngine) -> None:
    with sleeper.completion():
        with sleeper.completion():
            assert sleeper.sleep(60) == "draining"
            assert refuses(sleeper)
        await asyncio.sleep(0.01)
        assert (sleeper.state, engine.calls) == ("draining", [])
    await until(lambda: sleeper.state == "asleep")
    assert refuses(sleeper)
    assert sleeper.wake() == "waking"
    await until(lambda: sleeper.state == "awake")
    assert not refuses(sleeper)
    assert engine.calls == ["sleep", "wake"]


async def test_it_wakes_by_itself_when_nobody_asks_any_more(sleeper: Sleeper, engine: FakeEngine) -> None:
    sleeper.sleep(0.01)
    await until(lambda: engine.calls == ["sleep", "wake"] and sleeper.state == "awake")


async def test_a_lease_that_runs_out_before_all_has_ended_leaves_it_awake(sleeper: Sleeper, engine: FakeEngine) -> None:
    with sleeper.completion():
        sleeper.sleep(0.01)
        await until(lambda: sleeper.state == "awake")
        assert not refuses(sleeper)
    await asyncio.sleep(0.01)
    assert engine.calls == []


async def test_asking_again_counts_the_seconds_anew(sleeper: Sleeper, engine: FakeEngine) -> None:
    sleeper.sleep(0.01)
    sleeper.sleep(60)
    await asyncio.sleep(0.05)
    assert (sleeper.state, engine.calls) == ("asleep", ["sleep"])


async def test_waking_while_something_runs_takes_it_back(sleeper: Sleeper, engine: FakeEngine) -> None:
    with sleeper.completion():
        sleeper.sleep(60)
        assert sleeper.wake() == "awake"
        assert not refuses(sleeper)
    await asyncio.sleep(0.01)
    assert engine.calls == []


async def test_one_change_of_the_engine_ends_before_the_next(sleeper: Sleeper, engine: FakeEngine) -> None:
    """Woken while it falls asleep, and asked to sleep while it wakes."""
    engine.sleep_gate.clear()
    engine.wake_gate.clear()
    sleeper.sleep(60)
    await until(lambda: engine.calls == ["sleep"])
    assert sleeper.wake() == "waking" and refuses(sleeper)
    engine.sleep_gate.set()
    await until(lambda: engine.calls == ["sleep", "wake"])
    assert sleeper.sleep(60) == "draining" and refuses(sleeper)
    engine.wake_gate.set()
    await until(lambda: sleeper.state == "asleep")
    assert engine.calls == ["sleep", "wake", "sleep"]


# The routes, and who hears of it


@pytest.fixture
def settings(data_dir: Path, tiny_base: Path) -> DecoderSettings:
    return DecoderSettings(data_dir=data_dir, cache_dir=data_dir / "cache", model=str(tiny_base), decoder_sleeps=True)


@asynccontextmanager
async def decoder(engine: FakeEngine, settings: DecoderSettings) -> AsyncIterator[httpx.AsyncClient]:
    async with served(engine, settings) as app, client_of(app) as client:
        yield client


async def state(client: httpx.AsyncClient, path: str, **body: Any) -> str:
    reply = await client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["state"])


async def fall_asleep(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while await state(client, "/v1/sleep", seconds=60) != "asleep":  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_stream_ends_whole_and_others_are_told_to_come_back(engine: FakeEngine, settings: DecoderSettings) -> None:
    engine.stream_gate.clear()
    async with decoder(engine, settings) as client:
        stream = asyncio.create_task(client.post("/v1/completions", json=ASK | {"stream": True}))
        await engine.asked.wait()
        assert await state(client, "/v1/sleep", seconds=60) == "draining"
        refused, ready = await client.post("/v1/completions", json=ASK), await client.get("/ready")
        engine.stream_gate.set()
        assert (await stream).text.endswith("data: [DONE]\n\n")
        await fall_asleep(client)
        assert await state(client, "/v1/wake") == "waking"
        await until(lambda: engine.calls == ["sleep", "wake"])
        assert (await client.post("/v1/completions", json=ASK)).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert float(refused.headers["retry-after"]) > 0
    assert ready.status_code == 503 and "training" in ready.json()["error"]["message"]


async def test_the_gateway_and_other_services_pass_on_when_to_come_back(engine: FakeEngine, settings: DecoderSettings) -> None:
    async with served(engine, settings) as app, client_of(app) as client:
        await fall_asleep(client)
        gateway = create_gateway(GatewaySettings(data_dir=settings.data_dir), client, Redis())
        reply = await client_of(gateway).post("/v1/completions", json=ASK)
        with pytest.raises(Unavailable, match="being trained") as refusal:
            await DecoderClient("http://decoder", transport=httpx.ASGITransport(app)).chat("Hi", policy_set="base", max_tokens=1)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    assert "policies are being trained" in reply.json()["error"]["message"]
    assert float(reply.headers["retry-after"]) == refusal.value.retry_after > 1


@pytest.mark.parametrize("path", ["/v1/sleep", "/v1/wake"])
async def test_a_decoder_that_may_not_sleep_says_how_to_allow_it(engine: FakeEngine, settings: DecoderSettings, path: str) -> None:
    async with decoder(engine, settings.model_copy(update={"decoder_sleeps": False})) as client:
        reply = await client.post(path, json={"seconds": 60})
    assert reply.status_code == 409
    assert "SIPO_DECODER_SLEEPS=true" in reply.json()["error"]["message"]
    assert engine.calls == []


@pytest.mark.parametrize("seconds", [0, -1, 1e9, "long", None])
async def test_a_lease_has_an_end(engine: FakeEngine, settings: DecoderSettings, seconds: object) -> None:
    async with decoder(engine, settings) as client:
        reply = await client.post("/v1/sleep", json={"seconds": seconds})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "seconds")
        assert (await client.get("/ready")).status_code == 200


async def test_an_engine_that_cannot_wake_ends_the_process(
    engine: FakeEngine, settings: DecoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: ended.append(call))
    engine.cannot_wake = True
    async with decoder(engine, settings) as client:
        await fall_asleep(client)
        assert await state(client, "/v1/wake") == "waking"
        await until(lambda: ended == [(os.getpid(), signal.SIGTERM)])
        assert (await client.get("/ready")).status_code == 503


async def test_it_can_be_stopped_while_it_sleeps(engine: FakeEngine, settings: DecoderSettings) -> None:
    async with asyncio.timeout(10):
        async with decoder(engine, settings) as client:
            await fall_asleep(client)
    assert engine.calls == ["sleep"]
