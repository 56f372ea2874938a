from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from services.common.web.clients import Completion, DecoderClient, ReviewerClient
from sipo.conversation import Message, as_messages
from sipo.errors import Conflict, InvalidRequest, NotFound, SipoError, Unavailable

CHAT = [{"role": "user", "content": "How long does an egg boil?"}]


class Service:
    """Answers every request with `reply`, or raises it; keeps what was asked."""

    def __init__(self, reply: httpx.Response | Exception) -> None:
        self.reply = reply
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.path, json.loads(request.content)))
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


def decoder(service: Service) -> DecoderClient:
    return DecoderClient("http://decoder", transport=httpx.MockTransport(service))


def reviewer(service: Service) -> ReviewerClient:
    return ReviewerClient("http://reviewer", transport=httpx.MockTransport(service))


def choice(index: int, text: str, *, chat: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": index, "finish_reason": "stop", "token_ids": [index, 2], **answer}


async def test_messages_go_to_the_chat_route_with_weights_and_set() -> None:
    service = Service(
        httpx.Response(200, json={"choices": [choice(0, "Eight minutes.", chat=True)], "usage": {"prompt_tokens": 9}})
    )
    weights = {"a": 0.7, "b": 0.3}
    answers = await decoder(service).chat(
        CHAT, weights=weights, policy_set="demo:1", max_tokens=8, temperature=0.5, seed=3, priority=2
    )
    assert answers == [Completion("Eight minutes.", [0, 2], "stop", 9)]
    expected = {
        "messages": CHAT,
        "preference_weights": weights,
        "policy_set": "demo:1",
        "max_tokens": 8,
        "temperature": 0.5,
        "seed": 3,
        "n": 1,
        "priority": 2,
        "return_token_ids": True,
    }
    assert service.asked == [("/v1/chat/completions", expected)]


@pytest.mark.parametrize("prompt", ["Q: How long? A:", [5, 6, 7]])
async def test_a_raw_prompt_goes_to_the_completion_route_and_answers_come_in_order(prompt: str | list[int]) -> None:
    choices = [choice(1, "b", chat=False), choice(0, "a", chat=False)]
    service = Service(httpx.Response(200, json={"choices": choices, "usage": {"prompt_tokens": 3}}))
    assert [answer.text for answer in await decoder(service).chat(prompt, max_tokens=8, n=2)] == ["a", "b"]
    ((path, body),) = service.asked
    assert path == "/v1/completions"
    assert body["prompt"] == prompt
    assert "preference_weights" not in body, "what is not given is left to the decoder"


async def test_a_review_and_its_rewrite() -> None:
    service = Service(httpx.Response(200, json={"review": "too long", "text": "Short.", "token_ids": [1], "finish_reason": "stop"}))
    common: dict[str, Any] = {"objectives": ["a", "b"], "weights": {"a": 1.0, "b": 0.0}, "policy_set": "demo:1", "max_tokens": 8}
    assert await reviewer(service).review("x", "y", **common) == "too long"
    assert await reviewer(service).rewrite("x", "y", "too long", **common) == Completion("Short.", [1], "stop", 0)
    assert [path for path, _ in service.asked] == ["/v1/reviews", "/v1/rewrites"]
    assert service.asked[1][1]["review"] == "too long"


async def test_a_conversation_goes_to_the_reviewer_as_its_messages() -> None:
    service = Service(httpx.Response(200, json={"review": "too long", "text": "Short.", "token_ids": [1], "finish_reason": "stop"}))
    talk = (Message(role="system", content="Be kind."), Message(role="user", content="x"))
    common: dict[str, Any] = {"objectives": ["a", "b"], "weights": {"a": 1.0, "b": 0.0}, "policy_set": "demo:1", "max_tokens": 8}
    await reviewer(service).review(talk, "y", **common)
    await reviewer(service).rewrite(talk, "y", "too long", **common)
    assert [body["prompt"] for _, body in service.asked] == [as_messages(talk)] * 2


def failing(status: int, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "said so", "param": "weights"}}, headers=headers)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequest), (422, InvalidRequest), (404, NotFound), (409, Conflict), (429, Unavailable), (503, Unavailable)],
)
async def test_an_error_keeps_the_services_words(status: int, kind: type[SipoError]) -> None:
    with pytest.raises(kind, match="said so") as caught:
        await decoder(Service(failing(status))).chat(CHAT, max_tokens=8)
    assert caught.value.param == (None if kind is Unavailable else "weights")


async def test_unavailable_keeps_the_services_time() -> None:
    with pytest.raises(Unavailable) as caught:
        await decoder(Service(failing(503, {"retry-after": "11"}))).chat(CHAT, max_tokens=8)
    assert caught.value.retry_after == 11


async def test_a_crash_of_the_service_is_no_fault_of_the_caller() -> None:
    with pytest.raises(SipoError, match="decoder failed: said so") as caught:
        await decoder(Service(failing(500))).chat(CHAT, max_tokens=8)
    assert type(caught.value) is SipoError


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("late"), httpx.RemoteProtocolError("cut")])
async def test_a_service_that_does_not_answer_is_unavailable(error: Exception) -> None:
    with pytest.raises(Unavailable, match="decoder at http://decoder does not answer"):
        await decoder(Service(error)).chat(CHAT, max_tokens=8)


async def test_an_error_in_no_known_shape_is_told_by_its_status() -> None:
    with pytest.raises(Unavailable, match="decoder answered HTTP 502"):
        await decoder(Service(httpx.Response(502, text="<html>"))).chat(CHAT, max_tokens=8)
