"""How services call each other over HTTP: the decoder (vLLM's OpenAI server with our fields) and the reviewer.

What went wrong comes out as our own errors, as sipo.http_errors says. Nothing is retried here: callers know whether to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict, Unpack

import httpx

from services.common.web.replicas import replica_client
from sipo.conversation import Prompt, as_json
from sipo.errors import SipoError
from sipo.http_errors import asking, service_error
from sipo.preferences import SamplingMode, Weights

SERVICE_TIMEOUT = httpx.Timeout(600, connect=5)  # seconds; an answer on a loaded CPU takes minutes

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

    def __init__(
        self, url: str, *, timeout: httpx.Timeout = SERVICE_TIMEOUT, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
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
        with asking(f"the {self.name} at {self.url}"):
            reply = await self._http.request(method, path, **content)
        if reply.is_error:
            raise service_error(reply, f"the {self.name}")
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


class WritingOptions(TypedDict):
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

    async def review(self, prompt: Prompt, response: str, **options: Unpack[WritingOptions]) -> str:
        """y^v, the critique of `response`."""
        review: str = (await self._post("/v1/reviews", {"prompt": as_json(prompt), "response": response, **options}))["review"]
        return review

    async def rewrite(self, prompt: Prompt, response: str, review: str, **options: Unpack[WritingOptions]) -> Completion:
        """y^a, `response` rewritten as `review` asks."""
        asked = {"prompt": as_json(prompt), "response": response, "review": review, **options}
        reply = await self._post("/v1/rewrites", asked)
        return Completion(reply["text"], reply["token_ids"], reply["finish_reason"], reply.get("prompt_tokens", 0))
