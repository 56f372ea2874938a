"""Deterministic stand-ins for unit tests and for injecting faults; integration tests use the real parts."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from sipo.policies import BaseModelRef, Manifest
from sipo.prompts import PromptFormat


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

    Faults: `error` (status, body) replaces the answer; `breaks_after` words a stream's connection is cut; `delay` seconds pass
    before every word. `stopped` is set when a caller left before the end.
    """

    def __init__(self) -> None:
        self.answer = "Boil it for eight minutes."
        self.finish_reason = "stop"
        self.end_token: int | None = 0
        self.delay = 0.0
        self.error: tuple[int, dict[str, Any]] | None = None
        self.breaks_after: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.stopped = asyncio.Event()
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self._complete)
        self.app.post("/v1/completions")(self._complete)
        self.app.get("/ready")(self._ready)

    def write(self, body: dict[str, Any]) -> str:
        return self.answer

    def token_ids(self, text: str) -> list[int]:
        """The same for the same text, and the end token where it ended by one."""
        return [*text.encode(), *([] if self.end_token is None else [self.end_token])]

    async def _ready(self) -> Response:
        return JSONResponse(self.error[1], self.error[0]) if self.error else JSONResponse({"status": "ready"})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
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
        leaving = asyncio.create_task(_left(request))
        done, _ = await asyncio.wait({leaving}, timeout=self.delay * len(self.answer.split()))
        leaving.cancel()
        if done:
            self.stopped.set()
        text = self.write(body)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("return_token_ids"):
            said["token_ids"] = self.token_ids(text)
        usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
        choice = {"index": 0, "finish_reason": self.finish_reason, "logprobs": None, **said}
        return JSONResponse(
            reply | {"object": "chat.completion" if chat else "text_completion", "choices": [choice], "usage": usage}
        )

    async def _stream(self, reply: dict[str, Any], chat: bool) -> AsyncIterator[str]:
        try:
            for i, word in enumerate(self.answer.split()):
                if i == self.breaks_after:
                    raise ConnectionResetError("the decoder was killed")
                await asyncio.sleep(self.delay)
                text = word if i == 0 else f" {word}"
                said = {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
                chunk = reply | {
                    "object": "chat.completion.chunk" if chat else "text_completion",
                    "choices": [{"index": 0, "finish_reason": None, **said}],
                }
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.stopped.set()
            raise


class WritingDecoder(FakeDecoder):
    """Writes something else for every prompt, weights and seed, always the same for the same ones."""

    def write(self, body: dict[str, Any]) -> str:
        asked = {key: body.get(key) for key in ("messages", "prompt", "preference_weights", "policy_set", "temperature", "seed")}
        return f"answer {hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]}"


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
