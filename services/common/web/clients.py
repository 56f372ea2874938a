"""How services call others over HTTP: the decoder (vLLM's OpenAI server with our fields), the reviewer, and teachers elsewhere.

What went wrong comes out as our own errors: Unavailable if the service does not answer, or says 503 or 429; the caller's mistakes
as InvalidRequest, NotFound or Conflict with the service's message; anything else as SipoError. Nothing is retried here: callers
know whether to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict, Unpack

import httpx
from pydantic import BaseModel, Field, ValidationError

from services.common.settings import Teacher
from services.common.web.replicas import replica_client
from sipo.errors import Conflict, InvalidRequest, NotFound, SipoError, Unavailable
from sipo.preferences import SamplingMode, Weights

TIMEOUT = httpx.Timeout(600, connect=5)  # seconds; an answer on a loaded CPU takes minutes

JOB_PRIORITY = 2  # of what a job asks for; interactive requests have 0

ChatMessages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: list[int]  # of the text, the end token included where it ended by itself
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int


class ServiceClient:
    """`name` is how errors call the service; `url` may be several of equal servers, separated by commas."""

    name: str

    def __init__(self, url: str, *, timeout: httpx.Timeout = TIMEOUT, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)  # the service queues, not the client
        if transport is None:
            self._http = replica_client(url, timeout=timeout, limits=limits)
        else:
            self._http = httpx.AsyncClient(base_url=url, timeout=timeout, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ready(self) -> str | None:
        """None if the service is ready, otherwise why not: what an application's own readiness asks."""
        try:
            await self._ask("GET", "/ready")
        except SipoError as error:
            return error.message
        return None

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = (await self._ask("POST", path, json={k: v for k, v in body.items() if v is not None})).json()
        return reply

    async def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            reply = await self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise Unavailable(f"the {self.name} at {self.url} does not answer ({type(error).__name__})") from error
        if reply.is_error:
            raise _error(self.name, reply)
        return reply


class DecoderClient(ServiceClient):
    name = "decoder"

    async def chat(
        self,
        prompt: str | Sequence[int] | ChatMessages,
        *,
        max_tokens: int,
        weights: Weights | None = None,
        policy_set: str | None = None,
        mode: SamplingMode | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
        n: int = 1,
        priority: int = 0,
        stop: Sequence[str] | None = None,
    ) -> list[Completion]:
        """`n` answers to chat messages, or continuations of a raw prompt (text, or the token ids themselves).

        `weights` join the policies of `policy_set` (default: uniform, and the current set) as `mode` says (default: MOD).
        A `stop` string ends an answer and is left out of its text, but not of its token ids.
        """
        chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        body = {
            "messages" if chat else "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "preference_weights": weights,
            "policy_set": policy_set,
            "mode": mode,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "n": n,
            "priority": priority,
            "stop": stop,
            "return_token_ids": True,
        }
        reply = await self._post("/v1/chat/completions" if chat else "/v1/completions", body)
        return [
            Completion(
                text=(choice["message"]["content"] or "") if chat else choice["text"],
                token_ids=choice["token_ids"],
                finish_reason=choice["finish_reason"],
                prompt_tokens=reply["usage"]["prompt_tokens"],
            )
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"])
        ]

    async def sleep(self, seconds: float) -> str:
        """Asks for its GPU's memory, for so many seconds from now: "asleep" once it has given it up, otherwise how far it is."""
        state: str = (await self._post("/v1/sleep", {"seconds": seconds}))["state"]
        return state

    async def wake(self) -> None:
        await self._post("/v1/wake", {})


class Asked(TypedDict):
    """For whom the reviewer writes, and how. `weights` join the policies: w_e for a review, w_m for a rewrite."""

    objectives: Sequence[str]
    weights: Weights
    policy_set: str
    mode: NotRequired[SamplingMode]
    max_tokens: int
    temperature: NotRequired[float]
    seed: NotRequired[int | None]


class ReviewerClient(ServiceClient):
    """Eq. 4 and 5."""

    name = "reviewer"

    async def review(self, prompt: str, response: str, **asked: Unpack[Asked]) -> str:
        """y^v, the critique of `response`."""
        review: str = (await self._post("/v1/reviews", {"prompt": prompt, "response": response, **asked}))["review"]
        return review

    async def rewrite(self, prompt: str, response: str, review: str, **asked: Unpack[Asked]) -> Completion:
        """y^a, `response` rewritten as `review` asks."""
        reply = await self._post("/v1/rewrites", {"prompt": prompt, "response": response, "review": review, **asked})
        return Completion(reply["text"], reply["token_ids"], reply["finish_reason"], reply.get("prompt_tokens", 0))


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str


class _ChatCompletion(BaseModel):
    """As much of OpenAI's as is needed here."""

    choices: list[_Choice] = Field(min_length=1)


class TeacherClient:
    """An OpenAI-compatible endpoint of another. `name` is the operator's for it, and how errors call it."""

    def __init__(self, name: str, teacher: Teacher) -> None:
        self.name = f"teacher {name!r}"
        self._model = teacher.model
        self._key = teacher.api_key.get_secret_value() if teacher.api_key else None
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else None
        # Not through replica_client: the way to another's endpoint may be a proxy, which httpx finds in the environment.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._http = httpx.AsyncClient(base_url=str(teacher.url), headers=headers, timeout=TIMEOUT, limits=limits)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def answer(self, messages: ChatMessages, *, max_tokens: int, temperature: float, seed: int) -> tuple[str, str]:
        """Text and finish reason. What cannot be used as an answer (filtered, a tool call) has its finish reason and no text.

        Raises Unavailable if the endpoint is away, full or broken, SipoError for anything else that is no chat completion: it is
        set up wrongly, or takes no such request.
        """
        body = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        try:
            reply = await self._http.post("/chat/completions", json=body)
        except httpx.TransportError as error:
            raise Unavailable(f"the {self.name} does not answer ({type(error).__name__})") from error
        except httpx.DecodingError as error:
            raise SipoError(f"the {self.name} sent what cannot be read: {error}") from error
        if _filtered(reply):
            return "", "content_filter"
        if not reply.is_success:
            message = f"the {self.name} answered HTTP {reply.status_code}: {self._said(reply)}"
            away = reply.is_server_error or reply.status_code in (408, 429)
            raise _unavailable(message, reply) if away else SipoError(message)
        try:
            choice = _ChatCompletion.model_validate_json(reply.content).choices[0]
        except ValidationError as error:
            raise SipoError(f"the {self.name} sent no chat completion: {self._said(reply)}") from error
        whole = choice.finish_reason in ("stop", "length")
        return (choice.message.content or "") if whole else "", choice.finish_reason

    def _said(self, reply: httpx.Response) -> str:
        """The beginning of what came, on one line, without the key: some endpoints repeat it when they refuse it."""
        said = reply.text.replace(self._key, "**********") if self._key else reply.text
        return " ".join(said.split())[:300]


def _filtered(reply: httpx.Response) -> bool:
    """A prompt that the endpoint will not answer, as Azure says it: no answer, and nobody's mistake."""
    try:
        return reply.status_code == httpx.codes.BAD_REQUEST and reply.json()["error"]["code"] == "content_filter"
    except (ValueError, KeyError, TypeError):
        return False


def _error(service: str, reply: httpx.Response) -> SipoError:
    """Our error for an HTTP status; its message is the service's own where it sent one in OpenAI's shape."""
    try:
        sent = reply.json()["error"]
        message, param = str(sent["message"]), sent.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param = f"the {service} answered HTTP {reply.status_code} {reply.reason_phrase}", None
    if reply.status_code in (429, 502, 503, 504):
        return _unavailable(message, reply)
    if reply.status_code == 404:
        return NotFound(message, param=param)
    if reply.status_code == 409:
        return Conflict(message, param=param)
    if reply.status_code < 500:
        return InvalidRequest(message, param=param)
    return SipoError(f"the {service} failed: {message}")


def _unavailable(message: str, reply: httpx.Response) -> Unavailable:
    try:
        return Unavailable(message, retry_after=float(reply.headers["retry-after"]))
    except (KeyError, ValueError):
        return Unavailable(message)
