"""Which of several equal servers gets a request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import httpx
import pytest

from services.common.web import replicas
from services.common.web.replicas import ReplicaTransport

Answer = Callable[[httpx.Request], httpx.Response]


class Servers:
    """Answers by host; counts what each was asked. A host without an answer cannot be reached."""

    def __init__(self, **answers: int) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.asked.append(host)
        assert request.headers["host"] == f"{host}:8001"
        await self.hold.wait()
        if host not in self.answers:
            raise httpx.ConnectError("refused")
        return httpx.Response(self.answers[host], content=request.content)


def client(servers: Servers) -> httpx.AsyncClient:
    transport = ReplicaTransport("http://a:8001, http://b:8001", httpx.MockTransport(servers))
    return httpx.AsyncClient(base_url=transport.base_url, transport=transport)


async def test_requests_one_after_the_other_take_turns() -> None:
    servers = Servers(a=200, b=200)
    async with client(servers) as http:
        for _ in range(4):
            assert (await http.post("/v1/completions", content=b"x")).content == b"x"

    assert servers.asked == ["a", "b", "a", "b"]


async def test_a_request_goes_where_the_least_runs() -> None:
    servers = Servers(a=200, b=200)
    async with client(servers) as http:
        async with http.stream("GET", "/"):  # on a, until its body is read
            for _ in range(3):
                await http.get("/")
        await http.get("/")

    assert servers.asked == ["a", "b", "b", "b", "a"]


async def test_what_one_cannot_do_another_does() -> None:
    for servers in (Servers(b=200), Servers(a=503, b=200)):
        async with client(servers) as http:
            replies = [await http.post("/", content=b"x") for _ in range(2)]
        assert [(reply.status_code, reply.content) for reply in replies] == [(200, b"x")] * 2
        assert servers.asked[:2] == ["a", "b"]


async def test_a_replica_that_could_not_be_reached_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PAUSE", math.inf)
    servers = Servers(b=200)
    async with client(servers) as http:
        for _ in range(3):
            await http.get("/")

    assert servers.asked == ["a", "b", "b", "b"]


async def test_when_none_can_the_last_ones_answer_stands() -> None:
    async with client(Servers(a=503, b=503)) as http:
        assert (await http.get("/")).status_code == 503
    async with client(Servers()) as http:
        try:
            await http.get("/")
        except httpx.ConnectError as error:
            assert str(error) == "refused"
        else:
            raise AssertionError("no error")


async def test_errors_of_the_request_itself_are_not_repeated() -> None:
    servers = Servers(a=400, b=200)
    async with client(servers) as http:
        assert (await http.get("/")).status_code == 400

    assert servers.asked == ["a"]


async def test_a_cancelled_request_no_longer_counts() -> None:
    servers = Servers(a=200, b=200)
    servers.hold.clear()
    async with client(servers) as http:
        waiting = [asyncio.create_task(http.get("/")) for _ in range(2)]
        while len(servers.asked) < 2:  # noqa: ASYNC110  # both are under way
            await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait([waiting[0]])
        servers.hold.set()
        await http.get("/")
        await waiting[1]

    assert servers.asked == ["a", "b", "a"]
