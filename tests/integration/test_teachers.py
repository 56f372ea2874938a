"""Candidates of a model elsewhere: a worker on a real queue asks an endpoint over real HTTP, which answers by order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from redis.asyncio import Redis

from gateway.worker.app import create_app
from gateway.worker.settings import WorkerSettings
from services.common.contract.keys import CANDIDATES, DECISIONS, PROMPTS, dead
from services.common.contract.messages import PromptDecided, PromptQueued, PromptSampled
from services.common.local.processes import free_ports
from services.common.queue import Queue, connect
from services.common.settings import Teacher
from services.common.web.clients import DecoderClient, ReviewerClient
from services.common.web.teachers import TeacherClient
from services.reviewer.app import create_app as create_reviewer
from services.reviewer.settings import ReviewerSettings
from sipo.errors import SipoError, Unavailable
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from support import PATIENCE
from tests.fakes import WritingDecoder, write_policy_set
from tests.plans import sampling_plan

pytestmark = pytest.mark.slow

KEY = "sk-very-secret"
CHAT = [{"role": "user", "content": "x"}]
ASKED: dict[str, Any] = {"max_tokens": 8, "temperature": 0.5, "seed": 3}


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None, "message": message}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": {"total_tokens": 3}}


def refusal(status: int, message: str, **more: Any) -> Response:
    return JSONResponse({"error": {"message": message} | more}, status)


class Endpoint:
    """Answers with `replies`, one after the other, the last one again and again; keeps what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.replies: list[Response] = [JSONResponse(completion(" The teacher's.\n"))]
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.keys.add(request.headers.get("authorization"))
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def teacher(self, key: str | None = KEY) -> Teacher:
        return Teacher(url=self.url, model="big-1", api_key=key)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    (port,) = free_ports(1)
    endpoint, app = Endpoint(f"http://127.0.0.1:{port}/v1"), FastAPI()
    app.post("/v1/chat/completions")(endpoint.answer)
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110, it tells nobody
        await asyncio.sleep(0.01)
    yield endpoint
    server.should_exit = True
    await serving


@pytest.fixture
async def client(endpoint: Endpoint) -> AsyncIterator[TeacherClient]:
    client = TeacherClient("big", endpoint.teacher())
    yield client
    await client.aclose()


async def test_an_answer_is_taken_as_it_is(client: TeacherClient, endpoint: Endpoint) -> None:
    assert await client.answer(CHAT, **ASKED) == (" The teacher's.\n", "stop")
    assert endpoint.bodies == [{"model": "big-1", "messages": CHAT, **ASKED}]
    assert endpoint.keys == {f"Bearer {KEY}"}


async def test_a_teacher_may_need_no_key(endpoint: Endpoint) -> None:
    client = TeacherClient("big", endpoint.teacher(key=None))
    await client.answer(CHAT, **ASKED)
    await client.aclose()
    assert endpoint.keys == {None}


@pytest.mark.parametrize(
    ("reply", "taken"),
    [
        (JSONResponse(completion("As long as", "length")), ("As long as", "length")),
        (JSONResponse(completion("I was about to", "content_filter")), ("", "content_filter")),
        (JSONResponse(completion(None, "tool_calls")), ("", "tool_calls")),
        (JSONResponse(completion(None)), ("", "stop")),
        (refusal(400, "The prompt was filtered", code="content_filter"), ("", "content_filter")),
    ],
)
async def test_what_is_no_answer_has_no_text(
    client: TeacherClient, endpoint: Endpoint, reply: Response, taken: tuple[str, str]
) -> None:
    endpoint.replies = [reply]
    assert await client.answer(CHAT, **ASKED) == taken


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
async def test_an_endpoint_that_is_full_or_broken_may_work_later(client: TeacherClient, endpoint: Endpoint, status: int) -> None:
    endpoint.replies = [refusal(status, "not now")]
    with pytest.raises(Unavailable, match=f"the teacher 'big' answered HTTP {status}: .*not now"):
        await client.answer(CHAT, **ASKED)


async def test_an_endpoint_that_is_away_may_work_later() -> None:
    client = TeacherClient("big", Teacher(url=f"http://127.0.0.1:{free_ports(1)[0]}/v1", model="m"))
    with pytest.raises(Unavailable, match=r"the teacher 'big' does not answer \(ConnectError\)"):
        await client.answer(CHAT, **ASKED)
    await client.aclose()


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (refusal(401, f"Incorrect API key provided: {KEY}."), "answered HTTP 401: .*provided: \\*+\\."),
        (refusal(403, "not in your country"), "answered HTTP 403: .*not in your country"),
        (JSONResponse({"detail": "Not\n  Found"}, 404), r"answered HTTP 404: .*Not\\n Found"),
        (refusal(400, "max_tokens is not supported"), "answered HTTP 400: .*max_tokens is not supported"),
        (Response(status_code=302, headers={"location": "/login"}), "answered HTTP 302"),
        (Response(f"<html>\n<b>{KEY}</b>"), r"sent no chat completion: <html> <b>\*+</b>"),
        (JSONResponse({"choices": []}), "sent no chat completion"),
        (Response(b"zip", headers={"content-encoding": "gzip"}), "sent what cannot be read"),
    ],
)
async def test_what_only_the_operator_can_mend_is_told_without_the_key(
    client: TeacherClient, endpoint: Endpoint, reply: Response, says: str
) -> None:
    endpoint.replies = [reply]
    with pytest.raises(SipoError, match=f"the teacher 'big' {says}") as caught:
        await client.answer(CHAT, **ASKED)
    assert type(caught.value) is SipoError
    assert KEY not in str(caught.value)


# In the worker


Start = Callable[[], AbstractAsyncContextManager[None]]


@pytest.fixture
def start(data_dir: Path, tiny_base: Path, redis: Redis, redis_url: str, endpoint: Endpoint) -> Start:
    """Runs a worker that knows one teacher, for the time of the body."""
    write_policy_set(data_dir / "policies", "demo:1", ["a", "b"], prompt_format=PromptFormat(system="Be kind."))
    write_policy_set(data_dir / "policies", "raw:1", ["a", "b"], prompt_format=PromptFormat(kind="raw", template="Q: {prompt} A:"))

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        to_decoder = httpx.ASGITransport(WritingDecoder().app)
        reviewer = create_reviewer(
            ReviewerSettings(data_dir=data_dir, model=str(tiny_base)), DecoderClient("http://decoder", transport=to_decoder)
        )
        app = create_app(
            WorkerSettings(data_dir=data_dir, teachers={"big": endpoint.teacher()}),
            connect(redis_url),
            DecoderClient("http://decoder", transport=to_decoder),
            ReviewerClient("http://reviewer", transport=httpx.ASGITransport(reviewer)),
        )
        async with app.router.lifespan_context(app):
            yield

    return start


def queued(*, refine: bool = False, policy_set: str = "demo:1") -> PromptQueued:
    plan = sampling_plan(
        sampling_set=policy_set, weights=[{"a": 0.3, "b": 0.7}, {"a": 0.7, "b": 0.3}], refine=refine, teachers={"big": 2}
    )
    example = Example(prompt="What is it?", response_0="no", response_1="yes", labels={"a": 1, "b": 0})
    return PromptQueued(job="job-1", round=1, prompt="0", example=example, plan=plan)


async def test_teachers_answer_beside_the_policies_and_come_last(start: Start, redis: Redis, endpoint: Endpoint) -> None:
    await Queue(redis).put(PROMPTS, queued(refine=True))
    async with start():
        message = await sampled(redis)
    assert PromptSampled.model_validate_json(message.model_dump_json()) == message
    assert [one.stage for one in message.candidates] == [*2 * ["sample", "rewrite"], "distilled", "distilled"]
    assert [one.weights is None for one in message.candidates] == [one.stage == "distilled" for one in message.candidates]
    for one in message.candidates[4:]:
        assert (one.text, one.teacher, one.finish_reason, one.token_ids) == (" The teacher's.\n", "big", "stop", [])
    first, second = endpoint.bodies
    assert first["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is it?"}]
    assert (first["temperature"], first["max_tokens"]) == (0.7, 32)
    assert first["seed"] != second["seed"]


async def test_of_a_raw_format_a_teacher_sees_the_bare_prompt(start: Start, redis: Redis, endpoint: Endpoint) -> None:
    await Queue(redis).put(PROMPTS, queued(policy_set="raw:1"))
    async with start():
        await sampled(redis)
    assert endpoint.bodies[0]["messages"] == [{"role": "user", "content": "What is it?"}]


@pytest.mark.slow
async def test_a_full_teacher_costs_no_try_and_the_seeds_stay(start: Start, redis: Redis, endpoint: Endpoint) -> None:
    endpoint.replies = [refusal(429, "slow down")] * 5 + endpoint.replies  # more often than a message may be tried
    await Queue(redis).put(PROMPTS, queued())
    async with start():
        message = await sampled(redis)
    assert [one.stage for one in message.candidates] == ["sample", "sample", "distilled", "distilled"]
    assert len({body["seed"] for body in endpoint.bodies}) == 2
    assert await redis.xlen(dead(PROMPTS)) == 0


async def test_a_filtered_answer_is_no_reason_to_lose_the_prompt(start: Start, redis: Redis, endpoint: Endpoint) -> None:
    endpoint.replies.insert(0, JSONResponse(completion("I was about to", "content_filter")))
    await Queue(redis).put(PROMPTS, queued())
    async with start():
        message = await sampled(redis)
    distilled = sorted((one.text, one.finish_reason) for one in message.candidates[2:])
    assert distilled == [("", "content_filter"), (" The teacher's.\n", "stop")]


@pytest.mark.slow
async def test_a_refused_key_fails_the_prompt_with_the_endpoints_words_and_is_told_nowhere(
    start: Start, redis: Redis, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    endpoint.replies = [refusal(401, f"Incorrect API key provided: {KEY}.")]
    await Queue(redis).put(PROMPTS, queued())
    async with start():
        await until(lambda: _length(redis, DECISIONS))
    [(_, fields)] = await redis.xrange(DECISIONS)
    decision = PromptDecided.model_validate_json(fields["data"])
    assert decision.outcome == "failed"
    assert "the teacher 'big' answered HTTP 401: " in (decision.error or "")
    assert "Incorrect API key provided: ***" in (decision.error or "")
    [(_, letter)] = await redis.xrange(dead(PROMPTS))
    assert "Incorrect API key provided: ***" in caplog.text
    assert KEY not in f"{fields} {letter} {caplog.text}"


async def sampled(redis: Redis) -> PromptSampled:
    await until(lambda: _length(redis, CANDIDATES))
    [(_, fields)] = await redis.xrange(CANDIDATES)
    return PromptSampled.model_validate_json(fields["data"])


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110, what is awaited is in the queue server
            await asyncio.sleep(0.02)


async def _length(redis: Redis, stream: str) -> bool:
    return await redis.xlen(stream) > 0
