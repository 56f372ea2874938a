"""The gateway as OpenAI's own client sees it, over real sockets, with a fake decoder behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from redis.asyncio import Redis

from gateway.app import create_app
from gateway.settings import GatewaySettings
from support import PATIENCE
from tests.fakes import FakeDecoder, write_policy_set

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "How do I boil an egg?"}]


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
async def client(tmp_path: Path, decoder: FakeDecoder, redis: Redis) -> AsyncIterator[openai.AsyncOpenAI]:
    write_policy_set(tmp_path / "policies", "demo:1", ["concise", "warm"], current=True)
    async with AsyncExitStack() as stack:
        upstream = httpx.AsyncClient(base_url=await stack.enter_async_context(serving(decoder.app)), timeout=httpx.Timeout(None))
        url = await stack.enter_async_context(serving(create_app(GatewaySettings(data_dir=tmp_path), upstream, redis)))
        yield await stack.enter_async_context(openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0))


async def test_an_answer_carries_the_effective_weights(client: openai.AsyncOpenAI, decoder: FakeDecoder) -> None:
    answer = await client.chat.completions.create(
        model="demo", messages=MESSAGES, extra_body={"preference_weights": {"concise": 0.7, "warm": 0.3}}
    )
    assert answer.choices[0].message.content == decoder.answer
    assert answer.model_extra is not None
    assert answer.model_extra["preference_weights"] == pytest.approx({"concise": 0.7, "warm": 0.3})
    assert answer.model_extra["policy_set"] == "demo:1"
    assert answer._request_id


async def test_a_stream_arrives_word_by_word(client: openai.AsyncOpenAI, decoder: FakeDecoder) -> None:
    """The decoder writes a word only when the one before has arrived: from a gateway that buffers, none ever would."""
    decoder.pace = asyncio.Semaphore(1)
    words = []
    async with asyncio.timeout(PATIENCE):
        async for chunk in await client.chat.completions.create(model="demo@concise=1,warm=0", messages=MESSAGES, stream=True):
            words.append(chunk.choices[0].delta.content)
            assert chunk.model_extra is not None
            assert chunk.model_extra["preference_weights"] == {"concise": 1, "warm": 0}
            decoder.pace.release()
    assert "".join(word or "" for word in words) == decoder.answer


async def test_plain_completions_stream_too(client: openai.AsyncOpenAI, decoder: FakeDecoder) -> None:
    stream = await client.completions.create(model="demo", prompt="Once", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == decoder.answer


async def test_errors_arrive_as_the_clients_own_exceptions(client: openai.AsyncOpenAI, decoder: FakeDecoder) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert (missing.value.param, missing.value.code) == ("model", "not_found")
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="demo@concise=2,warm=0", messages=MESSAGES, stream=True)
    assert "sum to 2" in wrong.value.message
    decoder.error = (400, {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}})
    with pytest.raises(openai.BadRequestError, match="too long"):
        await client.chat.completions.create(model="demo", messages=MESSAGES)


async def test_a_decoder_that_dies_in_mid_stream_raises_at_the_caller(client: openai.AsyncOpenAI, decoder: FakeDecoder) -> None:
    decoder.breaks_after = 2
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    words = []
    with pytest.raises(openai.APIError, match="stopped in the middle"):
        async for chunk in stream:
            words.append(chunk.choices[0].delta.content)
    assert words == ["Boil", " it"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_leaves_stops_the_decoder(client: openai.AsyncOpenAI, decoder: FakeDecoder, stream: bool) -> None:
    """He leaves when the first word of his stream is there, or without a stream when the decoder is at work; it never ends."""
    decoder.pace = asyncio.Semaphore(1)
    arrived = asyncio.Event()

    async def ask() -> None:
        if stream:
            async for _ in await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True):
                arrived.set()
        else:
            await client.chat.completions.create(model="demo", messages=MESSAGES)

    asking = asyncio.create_task(ask())
    async with asyncio.timeout(PATIENCE):
        await (arrived if stream else decoder.asked).wait()
        asking.cancel()
        await decoder.stopped.wait()
    await asyncio.wait([asking])


async def test_models_are_listed_and_retrieved(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["demo", "demo:1", "base"]
    assert (await client.models.retrieve("demo:1")).id == "demo:1"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("demo:2")
