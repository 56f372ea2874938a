"""Deterministic stand-ins for unit tests and for injecting faults; integration tests use the real parts."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from services.common.limits import Limits
from sipo.errors import IncompatiblePolicy, Unavailable
from sipo.models import BaseModelRef
from sipo.policies import Manifest
from sipo.prompts import PromptFormat

if TYPE_CHECKING:
    from services.decoder.settings import DecoderSettings


def write_policy_set(
    root: Path, identifier: str, objectives: list[str], *, current: bool = False, prompt_format: PromptFormat | None = None
) -> Manifest:
    """A published set as far as readers of manifests see it: without any adapter."""
    name, version = identifier.split(":")
    manifest = Manifest(
        name=name,
        version=int(version),
        created=datetime(2026, 1, 1, tzinfo=UTC),
        base=BaseModelRef(name="smollm2-135m", sha256="0" * 64),
        prompt_format=prompt_format or PromptFormat(),
        objectives=objectives,
        beta=0.1,
        adapters={},
    )
    folder = root / name / version
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    if current:
        (root / name / "current").symlink_to(version)
    return manifest


class FakeDecoder:
    """vLLM's HTTP as far as callers see it. Every answer is the words of `answer`; `bodies` keeps what was asked.

    Faults: `error` (status, body) replaces the answer; `breaks_after` words a stream's connection is cut. With a semaphore as
    `pace` every word waits for a release of it. `asked` is set when a request has come, `stopped` when a caller left before the
    end.
    """

    def __init__(self) -> None:
        self.answer = "Boil it for eight minutes."
        self.finish_reason = "stop"
        self.end_token: int | None = 0
        self.pace: asyncio.Semaphore | None = None
        self.error: tuple[int, dict[str, Any]] | None = None
        self.breaks_after: int | None = None
        self.limits = Limits(slots=2, max_model_len=4096)
        self.bodies: list[dict[str, Any]] = []
        self.asked = asyncio.Event()
        self.stopped = asyncio.Event()
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self._complete)
        self.app.post("/v1/completions")(self._complete)
        self.app.get("/ready")(self._ready)
        self.app.get("/v1/limits")(self._limits)

    def write(self, body: dict[str, Any]) -> str:
        return self.answer

    def token_ids(self, text: str) -> list[int]:
        """The same for the same text, and the end token where it ended by one."""
        return [*text.encode(), *([] if self.end_token is None else [self.end_token])]

    async def _ready(self) -> Response:
        return JSONResponse(self.error[1], self.error[0]) if self.error else JSONResponse({"status": "ready"})

    async def _limits(self) -> Limits:
        return self.limits

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.asked.set()
        if self.error is not None:
            return JSONResponse(self.error[1], self.error[0])
        chat = "messages" in body
        reply = {
            "id": "chatcmpl-1",
            "created": 1,
            "model": body.get("model", "demo"),
            "policy_set": body.get("policy_set"),
            "preference_weights": body.get("preference_weights"),
        }
        if body.get("stream"):
            return StreamingResponse(self._stream(reply, chat), media_type="text/event-stream")
        leaving, writing = asyncio.create_task(_left(request)), asyncio.create_task(self._write_all())
        await asyncio.wait({leaving, writing}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            self.stopped.set()
        leaving.cancel()
        writing.cancel()
        text = self.write(body)
        answer: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("return_token_ids"):
            answer["token_ids"] = self.token_ids(text)
        usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
        choice = {"index": 0, "finish_reason": self.finish_reason, "logprobs": None, **answer}
        return JSONResponse(
            reply | {"object": "chat.completion" if chat else "text_completion", "choices": [choice], "usage": usage}
        )

    async def _stream(self, reply: dict[str, Any], chat: bool) -> AsyncIterator[str]:
        try:
            for i, word in enumerate(self.answer.split()):
                if i == self.breaks_after:
                    raise ConnectionResetError("the decoder was killed")
                await self._next_word()
                text = word if i == 0 else f" {word}"
                piece = {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
                chunk = reply | {
                    "object": "chat.completion.chunk" if chat else "text_completion",
                    "choices": [{"index": 0, "finish_reason": None, **piece}],
                }
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.stopped.set()
            raise

    async def _write_all(self) -> None:
        for _ in self.answer.split():
            await self._next_word()

    async def _next_word(self) -> None:
        if self.pace is not None:
            await self.pace.acquire()


class WritingDecoder(FakeDecoder):
    """Writes something else for every prompt, weights and seed, always the same for the same ones."""

    def write(self, body: dict[str, Any]) -> str:
        asked = {key: body.get(key) for key in ("messages", "prompt", "preference_weights", "policy_set", "temperature", "seed")}
        return f"answer {hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]}"


class FakeEngine:
    """vLLM's server as a mirror: its reply shows the request that it got. `broken` names a set that it refuses, `room` is for so
    many sets. What a closed gate stands for takes its time: a stream, falling asleep, waking."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.calls: list[str] = []
        """Of sleep and wake."""
        self.broken: str | None = None
        self.cannot_wake = False
        self.room = 100
        self.failed = False
        self.asked = asyncio.Event()
        self.stream_gate, self.sleep_gate, self.wake_gate = (asyncio.Event() for _ in range(3))
        for gate in (self.stream_gate, self.sleep_gate, self.wake_gate):
            gate.set()
        self.app = FastAPI()
        self.app.post("/v1/completions")(self._complete)

    async def load(self, key: str, adapters: Mapping[str, Path]) -> None:
        await asyncio.sleep(0)
        if self.broken and key.startswith(self.broken):
            raise IncompatiblePolicy("does not fit")
        if len(self.loaded) >= self.room:
            raise Unavailable("no room")
        self.loaded.append(key)

    async def unload(self, key: str) -> None:
        self.loaded.remove(key)

    async def sleep(self) -> None:
        assert not self.loaded
        self.calls.append("sleep")
        await self.sleep_gate.wait()

    async def wake(self) -> None:
        self.calls.append("wake")
        await self.wake_gate.wait()
        if self.cannot_wake:
            raise RuntimeError("out of memory")

    async def _complete(self, request: Request) -> Response:
        self.asked.set()
        body = await request.json()
        reply = {"id": "cmpl-1", "model": body["model"], "seen": body}
        if not body.get("stream"):
            return JSONResponse(reply, 400 if body.get("bad") else 200)
        return StreamingResponse(self._events(json.dumps(reply, separators=(",", ":"))), media_type="text/event-stream")

    async def _events(self, reply: str) -> AsyncIterator[str]:
        yield f"data: {reply}\n\n"
        await self.stream_gate.wait()
        yield f"data: {reply}\n\n"
        yield "data: [DONE]\n\n"


@asynccontextmanager
async def served(engine: FakeEngine, settings: DecoderSettings) -> AsyncIterator[FastAPI]:
    """The decoder's own application on a fake engine, once it is ready."""
    from services.decoder.app import create_app

    @asynccontextmanager
    async def open_engine(_model: Path) -> AsyncIterator[FakeEngine]:
        yield engine

    app = create_app(settings, open_engine)
    async with app.router.lifespan_context(app), client_of(app) as client:
        while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110  # asks as a caller would
            await asyncio.sleep(0.01)
        yield app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://decoder")


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
