"""The decoder over HTTP: vLLM's completion routes, each request with its mixture of policies put in and its reply with what was in
effect. Only these routes exist: vLLM's others would let requests in that name no mixture."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import structlog
from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.background import begin
from services.common.limits import Limits
from services.common.web.app import create_app as create_common_app
from services.decoder.choice import Choice, ChoiceFields, Chooser
from services.decoder.residency import Loader, ResidentSets
from services.decoder.settings import DecoderSettings
from services.decoder.sleeping import Sleeper, Sleeps, State, refusal
from sipo.decoding.request import EXTRA_ARG
from sipo.errors import Conflict, InvalidRequest, Unavailable
from sipo.models import model_sha256, resolve_model
from sipo.targets import check_messages, check_prompt

log = structlog.get_logger(__name__)

HEARTBEAT = 1.0
"""Seconds between two looks at whether the engine lives."""


class Engine(Loader, Sleeps, Protocol):
    """vLLM's OpenAI server, or a fake of it."""

    app: ASGIApp

    @property
    def failed(self) -> bool: ...


OpenEngine = Callable[[Path], AbstractAsyncContextManager[Engine]]
"""Starts the engine on a model's folder, and stops it at the end."""


class SleepRequest(BaseModel):
    """Asks for the GPU's memory, for so many seconds from now."""

    model_config = ConfigDict(extra="forbid")

    seconds: float = Field(gt=0, le=3600, description="after which the decoder wakes by itself, unless it is asked again")


class SleepState(BaseModel):
    state: State = Field(description="draining: what runs ends first. Only one that is asleep has given its memory up")


def create_app(settings: DecoderSettings, open_engine: OpenEngine) -> FastAPI:
    """The application answers at once; /ready tells when the engine does. If the engine dies, so does the process: whoever started
    it starts it again."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = begin(_run_engine(app, settings, open_engine))
        yield
        running.cancel()
        await asyncio.wait([running])

    async def ready() -> str | None:
        decoder: Decoder | None = app.state.decoder
        if decoder is None:
            return "the model is being loaded"
        return NOT_READY[decoder.sleeper.state]

    app = create_common_app("decoder", settings, lifespan, ready)
    app.state.decoder = None

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete(request: Request, fields: ChoiceFields, decoder: Loaded) -> Response:
        """OpenAI's request and reply as vLLM has them, and the fields of ChoiceFields."""
        body: dict[str, Any] = await request.json()
        _check_body(body)
        choice = await asyncio.to_thread(decoder.chooser.choose, fields)
        return MixedResponse(decoder, choice, fields, body)

    @app.get("/v1/limits")
    async def limits() -> Limits:
        """While it loads or sleeps too: a job may be posted then."""
        return Limits(slots=settings.decoder_slots, max_model_len=settings.decoder_max_model_len)

    @app.post("/v1/sleep", dependencies=[Depends(_may_sleep)])
    async def sleep(request: SleepRequest, decoder: Loaded) -> SleepState:
        """Answers at once; asked again, it tells how far the decoder is, and the seconds begin anew."""
        return SleepState(state=decoder.sleeper.sleep(request.seconds))

    @app.post("/v1/wake", dependencies=[Depends(_may_sleep)])
    async def wake(decoder: Loaded) -> SleepState:
        return SleepState(state=decoder.sleeper.wake())

    return app


class Decoder:
    """What a running decoder consists of."""

    def __init__(self, settings: DecoderSettings, engine: Engine, base_sha256: str) -> None:
        self.engine = engine
        self.served_name = settings.model
        self.residents = ResidentSets(engine, settings.decoder_sets)
        self.sleeper = Sleeper(engine, self.residents, settings.decoder_drain_seconds)
        store = settings.policies
        self.chooser = Chooser(store, settings, base_sha256)


async def _loaded(request: Request) -> Decoder:
    decoder: Decoder | None = request.app.state.decoder
    if decoder is None:
        raise Unavailable("the decoder is still loading the model", retry_after=1)
    return decoder


Loaded = Annotated[Decoder, Depends(_loaded)]

NOT_READY: dict[State, str | None] = {
    "awake": None,
    "draining": "training",
    "asleep": "training",
    "waking": "waking up after a training",
}


async def _may_sleep(request: Request) -> None:
    if not request.app.state.settings.decoder_sleeps:
        raise Conflict("this decoder never sleeps: start it with SIPO_DECODER_SLEEPS=true")


async def _run_engine(app: FastAPI, settings: DecoderSettings, open_engine: OpenEngine) -> None:
    try:
        model = await asyncio.to_thread(resolve_model, settings.model, settings.cache_dir)
        base_sha256 = await asyncio.to_thread(model_sha256, model, settings.cache_dir)
        async with open_engine(model) as engine:
            decoder = app.state.decoder = Decoder(settings, engine, base_sha256)
            log.info("ready", model=settings.model, slots=settings.decoder_slots)
            await asyncio.to_thread(_warn_of_wide_sets, settings)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_watch(engine))
                tasks.create_task(decoder.sleeper.run())
    finally:
        app.state.decoder = None


def _warn_of_wide_sets(settings: DecoderSettings) -> None:
    """Of the current sets that cannot be mixed here."""
    sets = settings.policies.current_sets()
    wide = {one.id: len(one.objectives) for one in sets if len(one.objectives) > settings.decoder_slots}
    if wide:
        log.warning(
            "current sets have more objectives than SIPO_DECODER_SLOTS: they can be asked in mode soup, but not be mixed",
            objectives=wide,
            slots=settings.decoder_slots,
        )


async def _watch(engine: Engine) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT)
        if engine.failed:
            raise RuntimeError("the engine's process ended")


def _check_body(body: dict[str, Any]) -> None:
    """What vLLM would not refuse: empty prompts, what it fails on, and a caller's program, as it lets policies' own pass."""
    inside = body.get("chat_template_kwargs")
    if body.get("chat_template") is not None or (isinstance(inside, dict) and inside.get("chat_template") is not None):
        raise InvalidRequest("chat_template cannot be given: it is the model's, or that of the policies", param="chat_template")
    if not isinstance(body.get("structured_outputs", {}), dict | None):
        raise InvalidRequest('structured_outputs must be an object, as {"choice": ["yes", "no"]}', param="structured_outputs")
    if "messages" in body:
        check_messages(body["messages"])
    else:
        check_prompt(body.get("prompt"))


class MixedResponse(Response):
    """vLLM's reply to the request with its mixture, sent on as it comes, with the effective set and weights put in."""

    def __init__(self, decoder: Decoder, choice: Choice, fields: ChoiceFields, body: dict[str, Any]) -> None:
        super().__init__()
        self.decoder = decoder
        self.choice = choice
        ours = set(ChoiceFields.model_fields)
        onward = {name: value for name, value in body.items() if name not in ours} | {
            "model": decoder.served_name,
            "cache_salt": choice.mixture.cache_salt(fields.cache_salt),
            "vllm_xargs": {EXTRA_ARG: choice.mixture.model_dump_json()},
        }
        if choice.chat_template is not None and "messages" in body:
            onward["chat_template"] = choice.chat_template
        self.request_body = json.dumps(onward).encode()
        self.annotate = _Annotation(choice.effective, decoder.served_name, fields.model or choice.effective["policy_set"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as leases:
            breaks_off = leases.enter_context(self.decoder.sleeper.completion())
            for policy_set in self.choice.policy_sets:
                await leases.enter_async_context(self.decoder.residents.lease(policy_set))
            await self._answer(scope, receive, send, breaks_off)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, breaks_off: asyncio.Event) -> None:
        unread = [{"type": "http.request", "body": self.request_body, "more_body": False}]

        async def receive_rewritten() -> Message:
            # After the body comes the caller's going away, at which vLLM aborts the request. Cancelling its task would not.
            return unread.pop() if unread else await _receive_until(breaks_off, receive)

        held: list[Message] = []
        """The reply's head, until the first piece of the body tells its length."""
        good, begun = True, False

        async def send_annotated(message: Message) -> None:
            nonlocal good, begun
            if breaks_off.is_set() and not begun:
                return  # what vLLM says to a caller that has gone
            if message["type"] == "http.response.start":
                good = message["status"] == 200
                held.append(message)
                return
            piece = self.annotate(message.get("body", b"")) if good else message.get("body", b"")
            if held:
                head = held.pop()
                headers = MutableHeaders(scope=head)
                if "content-length" in headers:
                    headers["content-length"] = str(len(piece))
                begun = True
                await send(head)
            await send({**message, "body": piece})

        scope = {name: value for name, value in scope.items() if name not in ("app", "endpoint", "route", "path_params", "router")}
        await self.decoder.engine.app(scope, receive_rewritten, send_annotated)
        if breaks_off.is_set() and not begun:
            raise refusal()


async def _receive_until(breaks_off: asyncio.Event, receive: Receive) -> Message:
    """The next message, or that the caller has gone once `breaks_off` is set."""
    received, broken_off = asyncio.ensure_future(receive()), asyncio.ensure_future(breaks_off.wait())
    try:
        await asyncio.wait([received, broken_off], return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"} if broken_off.done() else received.result()
    finally:
        received.cancel()
        broken_off.cancel()


class _Annotation:
    """Puts fields into a JSON object, or into each of a stream's events, without reading it: only its first brace is touched.

    vLLM sends a JSON reply in one piece, and whole events of a stream.
    """

    def __init__(self, fields: dict[str, Any], served_name: str, asked_name: str) -> None:
        self._fields = json.dumps(fields)[:-1].encode() + b","
        self._served = f'"model":{json.dumps(served_name)}'.encode()
        self._asked = f'"model":{json.dumps(asked_name)}'.encode()

    def __call__(self, body: bytes) -> bytes:
        if body.startswith(b"{"):
            return self._object(body)
        events = body.split(b"\n\n")
        return b"\n\n".join(b"data: " + self._object(event[6:]) if event.startswith(b"data: {") else event for event in events)

    def _object(self, text: bytes) -> bytes:
        # Before the model's name come only ids and times, so the first match is the field itself.
        return (self._fields + text[1:]).replace(self._served, self._asked, 1)
