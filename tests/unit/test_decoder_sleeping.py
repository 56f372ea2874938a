"""The decoder sleeps while policies are trained: who waits for whom, and what its callers are told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from redis.asyncio import Redis
from starlette.types import Receive, Scope, Send

from gateway.app import create_app as create_gateway
from gateway.settings import GatewaySettings
from services.common.background import end_tasks
from services.common.web.clients import DecoderClient
from services.decoder.residency import ResidentSets
from services.decoder.settings import DecoderSettings
from services.decoder.sleeping import Sleeper
from sipo.errors import Unavailable
from support import PATIENCE
from tests.fakes import FakeEngine, client_of, served

ASK = {"model": "base", "prompt": "Hi"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def sleeper(engine: FakeEngine) -> AsyncIterator[Sleeper]:
    sleeper = Sleeper(engine, ResidentSets(engine, 2), drain=60)
    running = asyncio.create_task(sleeper.run())
    yield sleeper
    await end_tasks(running)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
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


async def test_what_does_not_end_is_told_to_break_off(engine: FakeEngine) -> None:
    sleeper = Sleeper(engine, ResidentSets(engine, 2), drain=0.01)
    running = asyncio.create_task(sleeper.run())
    with sleeper.completion() as breaks_off:
        await asyncio.sleep(0.05)
        assert not breaks_off.is_set(), "nobody asked for sleep"
        sleeper.sleep(60)
        await asyncio.wait_for(breaks_off.wait(), PATIENCE)
        assert (sleeper.state, engine.calls) == ("draining", [])
    await until(lambda: sleeper.state == "asleep")
    await end_tasks(running)


async def test_waking_ends_the_time_to_drain(engine: FakeEngine) -> None:
    sleeper = Sleeper(engine, ResidentSets(engine, 2), drain=0.05)
    running = asyncio.create_task(sleeper.run())
    with sleeper.completion() as breaks_off:
        sleeper.sleep(60)
        await asyncio.sleep(0.01)
        sleeper.wake()
        await asyncio.sleep(0.1)
        assert not breaks_off.is_set()
    await end_tasks(running)


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
    async with asyncio.timeout(PATIENCE):
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


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The same over a real socket, which alone can stall."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    server.should_exit = True
    await task


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b'data: {"x": 1}\n\n' * 10_000


async def test_a_stream_whose_reader_stalls_is_broken_off(engine: FakeEngine, settings: DecoderSettings) -> None:
    engine.app = StreamingResponse(endless(), media_type="text/event-stream")
    quick = settings.model_copy(update={"decoder_drain_seconds": 0.05})
    async with (
        served(engine, quick) as app,
        listening(app) as client,
        client.stream("POST", "/v1/completions", json=ASK | {"stream": True}) as stalled,
    ):
        assert stalled.status_code == 200
        await fall_asleep(client)
        with pytest.raises(httpx.RemoteProtocolError):
            await stalled.aread()


async def test_an_answer_that_takes_too_long_is_aborted_and_refused(engine: FakeEngine, settings: DecoderSettings) -> None:
    async def as_vllm(scope: Scope, receive: Receive, send: Send) -> None:
        """Without a stream it answers null, which nobody hears, when its caller has gone."""
        await receive()
        engine.asked.set()
        assert (await receive())["type"] == "http.disconnect"
        await JSONResponse(None)(scope, receive, send)

    engine.app = as_vllm
    async with decoder(engine, settings.model_copy(update={"decoder_drain_seconds": 0.05})) as client:
        answer = asyncio.create_task(client.post("/v1/completions", json=ASK))
        await engine.asked.wait()
        await fall_asleep(client)
        refused = await answer
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert float(refused.headers["retry-after"]) > 0


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
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    engine.cannot_wake = True
    async with decoder(engine, settings) as client:
        await fall_asleep(client)
        assert await state(client, "/v1/wake") == "waking"
        await until(lambda: ended == [signal.SIGTERM])
        assert (await client.get("/ready")).status_code == 503


async def test_it_can_be_stopped_while_it_sleeps(engine: FakeEngine, settings: DecoderSettings) -> None:
    async with asyncio.timeout(PATIENCE):
        async with decoder(engine, settings) as client:
            await fall_asleep(client)
    assert engine.calls == ["sleep"]
