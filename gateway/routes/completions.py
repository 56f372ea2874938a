"""The OpenAI completion endpoints: checks what is ours (model name, preference weights), passes the rest on to the decoder.

The decoder is vLLM's own server, which checks every other field itself; its answers and its errors go back unchanged. What is
passed on is an allow-list: other fields are ignored, as OpenAI's clients send new ones all the time, except those whose silent
loss would mislead. Interactive requests go first in the decoder (priority 0; jobs have 2).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictFloat
from starlette.types import Receive, Scope, Send

from services.common.web.app import retry_header, sipo_error_body
from sipo.errors import InvalidRequest, Unavailable
from sipo.http_errors import openai_error, service_error
from sipo.targets import check_messages, check_prompt, resolve_target

router = APIRouter(tags=["completions"])
log = structlog.get_logger(__name__)

OPENAI = """
    frequency_penalty logit_bias logprobs max_completion_tokens max_tokens messages n parallel_tool_calls presence_penalty prompt
    reasoning_effort response_format seed stop stream stream_options suffix temperature tool_choice tools top_logprobs top_p user
"""
# Not among them: priority and vllm_xargs, which we set; chat_template, a program; prompt_logprobs, which is refused below.
VLLM = """
    add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template_kwargs continue_final_message
    echo ignore_eos include_stop_str_in_output length_penalty min_p min_tokens repetition_penalty return_token_ids
    skip_special_tokens spaces_between_special_tokens stop_token_ids structured_outputs top_k truncate_prompt_tokens
"""
DECODER = "coefficients mixing mixing_alpha mode"
"""How the policies are mixed: our decoder's own fields, which it checks."""
PASSED_ON = frozenset([*DECODER.split(), *OPENAI.split(), *VLLM.split()])
OURS = frozenset({"model", "preference_weights", "policy_set", "priority", "prompt_logprobs"})


class GenerationRequest(BaseModel):
    """What the gateway itself reads of a completion request; other fields are OpenAI's and vLLM's."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1, examples=["demo", "demo:2", "demo@concise=0.7,warm=0.3"])
    preference_weights: dict[str, StrictFloat] | None = Field(default=None, examples=[{"concise": 0.7, "warm": 0.3}])
    stream: bool = False
    prompt_logprobs: int | None = None


class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]] = Field(min_length=1)


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]]


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """An answer at the caller's preference weights (top-level `preference_weights`, or within the model name).

    Policies that were trained with a system text get it, unless the caller gives one.
    """
    check_messages(body.messages)
    return await _answer(body, request)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """As chat, but from a plain prompt."""
    check_prompt(body.prompt)
    return await _answer(body, request)


async def _answer(body: GenerationRequest, request: Request) -> Response:
    if body.prompt_logprobs is not None:
        message = "prompt_logprobs is not supported: the policies are mixed for generated tokens only"
        raise InvalidRequest(message, param="prompt_logprobs")
    gateway = request.app.state
    target = await asyncio.to_thread(resolve_target, gateway.policies, body.model, body.preference_weights)
    fields = body.model_dump(exclude_unset=True)
    if ignored := sorted(set(fields) - PASSED_ON - OURS):
        log.debug("fields ignored", fields=ignored)
    onward = {name: value for name, value in fields.items() if name in PASSED_ON} | {"model": body.model, "priority": 0}
    if target.policy_set is not None:
        onward |= {"model": target.policy_set.id, "policy_set": target.policy_set.id}
        if target.weights is not None:
            onward["preference_weights"] = target.weights
        if isinstance(body, ChatRequest):
            onward["messages"] = target.policy_set.manifest.prompt_format.with_system(body.messages)
    headers = {"x-request-id": request.state.request_id}
    upstream = gateway.decoder.build_request("POST", request.url.path, json=onward, headers=headers)
    return await _forward(gateway.decoder, upstream, request)


async def _forward(decoder: httpx.AsyncClient, upstream: httpx.Request, request: Request) -> Response:
    """The decoder's answer, or none if the caller goes away: closing its connection makes the decoder stop generating."""
    asking = asyncio.create_task(_ask(decoder, upstream))
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            return Response(status_code=499)  # nobody is there to read it; nginx's number for the log
        reply = asking.result()
    except httpx.TransportError as error:
        raise Unavailable("the decoder is not running, or still loading its model; try again soon") from error
    finally:
        asking.cancel()
        leaving.cancel()
    if reply.is_error:
        return _error(reply)
    if reply.is_stream_consumed:
        return Response(reply.content, media_type="application/json")
    return _Relay(reply)


async def _ask(decoder: httpx.AsyncClient, upstream: httpx.Request) -> httpx.Response:
    """The whole answer, or for an event stream its beginning."""
    reply = await decoder.send(upstream, stream=True)
    if reply.is_error or not reply.headers.get("content-type", "").startswith("text/event-stream"):
        await reply.aread()
    return reply


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(reply: httpx.Response) -> Response:
    """The decoder's own error in OpenAI's shape; what is not in that shape comes from something in between, or from a crash."""
    error, sent = service_error(reply, "the decoder"), openai_error(reply)
    if sent is None:
        raise error
    content = {"error": {name: sent.get(name) for name in ("message", "type", "param", "code")}}
    return JSONResponse(content, reply.status_code, retry_header(error))


class _Relay(StreamingResponse):
    """Passes server-sent events on as they come, whole ones only; a decoder that dies in between becomes an error event."""

    def __init__(self, reply: httpx.Response) -> None:
        self.reply = reply
        super().__init__(self.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def events(self) -> AsyncIterator[str]:
        try:
            async for line in self.reply.aiter_lines():
                if line:
                    yield f"{line}\n\n"
        except httpx.TransportError as error:
            log.warning("the decoder broke off a stream", error=repr(error))
            failure = Unavailable("the decoder stopped in the middle of this answer; ask again")
            yield f"data: {json.dumps(sipo_error_body(failure))}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.reply.aclose()
