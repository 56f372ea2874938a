"""What the trainer asks of decoders that share its GPU."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import httpx
import pytest

from services.common.web.clients import DecoderClient
from services.trainer import decoders
from services.trainer.decoders import asleep, decoder_clients
from sipo.errors import Conflict
from support import PATIENCE

Answer = str | int | httpx.TransportError


class Decoders:
    """Answers by host, the last answer again and again: a state, an HTTP status, or an error. Lists what was asked."""

    def __init__(self, **answers: list[Answer]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str]] = []
        self.clients = [DecoderClient(f"http://{host}", transport=httpx.MockTransport(self._answer)) for host in answers]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        host, path = request.url.host, request.url.path
        self.asked.append((host, path))
        if path == "/v1/wake":
            return httpx.Response(200, json={"state": "waking"})
        assert json.loads(request.content) == {"seconds": decoders.SLEEP_SECONDS}
        answer = self.answers[host].pop(0) if len(self.answers[host]) > 1 else self.answers[host][0]
        if isinstance(answer, httpx.TransportError):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer, json={"error": {"message": f"it said {answer}"}})
        return httpx.Response(200, json={"state": answer})

    @property
    def woken(self) -> Counter[str]:
        return Counter(host for host, path in self.asked if path == "/v1/wake")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "DRAIN_POLL_SECONDS", 0.001)
    monkeypatch.setattr(decoders, "ASK_AGAIN_SECONDS", 0.001)


async def test_training_begins_when_all_sleep_and_wakes_them_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "ASK_AGAIN_SECONDS", 60)
    asked = Decoders(a=["draining", "asleep"], b=[503, 404, 500, httpx.ReadTimeout("late"), "asleep"])
    async with asleep(asked.clients, asyncio.Event()):
        assert asked.answers == {"a": ["asleep"], "b": ["asleep"]}
        assert asked.asked == 5 * [("a", "/v1/sleep"), ("b", "/v1/sleep")]
        assert not asked.woken
    assert asked.woken == {"a": 1, "b": 1}


async def test_they_are_asked_again_while_training_runs_whatever_they_answer() -> None:
    asked = Decoders(a=["asleep", 409, 503, "draining", httpx.ConnectError("gone"), "asleep"])
    async with asyncio.timeout(PATIENCE):
        async with asleep(asked.clients, asyncio.Event()):
            while len(asked.asked) < 10:  # noqa: ASYNC110  # looks as a person would
                await asyncio.sleep(0.001)
    assert asked.asked[-1] == ("a", "/v1/wake")
    assert asked.woken == {"a": 1}


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ConnectTimeout("no route")])
async def test_a_decoder_that_is_not_there_holds_no_memory(error: httpx.TransportError) -> None:
    asked = Decoders(a=[error])
    async with asleep(asked.clients, asyncio.Event()):
        assert asked.asked[0] == ("a", "/v1/sleep")


async def test_one_that_may_not_sleep_ends_it_and_the_others_wake() -> None:
    asked = Decoders(a=["asleep"], b=[409])
    with pytest.raises(Conflict, match="the decoder at http://b does not sleep while policies are trained: it said 409"):
        async with asleep(asked.clients, asyncio.Event()):
            raise AssertionError("it trains")
    assert asked.woken["a"] == 1


async def test_they_wake_when_training_fails_or_is_cancelled() -> None:
    asked = Decoders(a=["asleep"])
    with pytest.raises(ZeroDivisionError):
        async with asleep(asked.clients, asyncio.Event()):
            raise ZeroDivisionError
    assert asked.woken == {"a": 1}

    async def train() -> None:
        async with asleep(asked.clients, asyncio.Event()):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(train(), 0.05)
    assert asked.woken == {"a": 2}


async def test_a_trainer_that_lost_its_lease_leaves_the_decoders_to_its_successor() -> None:
    asked, lost = Decoders(a=["asleep"]), asyncio.Event()
    async with asleep(asked.clients, lost):
        lost.set()
    assert not asked.woken


async def test_each_of_several_decoders_is_asked_itself() -> None:
    clients = decoder_clients("http://a:8001, http://b:8001")
    assert [client.url for client in clients] == ["http://a:8001", "http://b:8001"]
    for client in clients:
        await client.aclose()
