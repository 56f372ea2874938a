"""Deterministic stand-ins for unit tests and for injecting faults; integration tests use the real parts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from sipo.policies import BaseModelRef, Manifest
from sipo.prompts import PromptFormat


def write_policy_set(root: Path, identifier: str, objectives: list[str], *, current: bool = False) -> Manifest:
    """A published set as far as readers of manifests see it: without any adapter."""
    name, version = identifier.split(":")
    manifest = Manifest(
        name=name,
        version=int(version),
        created=datetime(2026, 1, 1, tzinfo=UTC),
        base=BaseModelRef(name="smollm2-135m", sha256="0" * 64),
        prompt_format=PromptFormat(),
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
        self.delay = 0.0
        self.error: tuple[int, dict[str, Any]] | None = None
        self.breaks_after: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.stopped = asyncio.Event()
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self._complete)
        self.app.post("/v1/completions")(self._complete)

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.error is not None:
            return JSONResponse(self.error[1], self.error[0])
        chat = "messages" in body
        reply = {
            "id": "chatcmpl-1",
            "created": 1,
            "model": body["model"],
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
        said = {"message": {"role": "assistant", "content": self.answer}} if chat else {"text": self.answer}
        usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None, **said}
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


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
