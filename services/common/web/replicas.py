"""Several equal servers behind one client: each request goes to the one with the least to do."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx

PAUSE = 5.0
"""Seconds for which a replica that could not be reached is asked last."""


@dataclass
class _Replica:
    url: httpx.URL
    running: int = 0
    requests: int = 0
    reached_again: float = 0.0
    """Moment (monotonic) before which others are preferred."""


class ReplicaTransport(httpx.AsyncBaseTransport):
    """For an httpx client of one base URL: `urls`, separated by commas, are where its requests really go.

    The replica with the fewest requests of this process under way is asked. One that cannot be reached, or says 503, passes the
    request on to the next: neither has begun to work on it. What breaks off later is the caller's to repeat.
    """

    def __init__(self, urls: str, inner: httpx.AsyncBaseTransport) -> None:
        self._replicas = [_Replica(httpx.URL(url.strip())) for url in urls.split(",")]
        self._inner = inner

    @property
    def base_url(self) -> httpx.URL:
        return self._replicas[0].url

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        now = time.monotonic()
        order = sorted(self._replicas, key=lambda replica: (replica.reached_again > now, replica.running, replica.requests))
        for replica in order[:-1]:
            try:
                reply = await self._ask(replica, request, content)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
            if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return reply
            await reply.aclose()
        return await self._ask(order[-1], request, content)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _ask(self, replica: _Replica, request: httpx.Request, content: bytes) -> httpx.Response:
        place = {"scheme": replica.url.scheme, "host": replica.url.host, "port": replica.url.port}
        headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"host"]
        onward = httpx.Request(
            request.method, request.url.copy_with(**place), headers=headers, content=content, extensions=request.extensions
        )
        replica.running += 1
        replica.requests += 1
        try:
            reply = await self._inner.handle_async_request(onward)
        except BaseException as error:
            replica.running -= 1
            if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
                replica.reached_again = time.monotonic() + PAUSE
            raise
        assert isinstance(reply.stream, httpx.AsyncByteStream)
        return httpx.Response(
            reply.status_code, headers=reply.headers, stream=_Counted(reply.stream, replica), extensions=reply.extensions
        )


class _Counted(httpx.AsyncByteStream):
    """A reply's body; until it is closed the replica is at work on it."""

    def __init__(self, inner: httpx.AsyncByteStream, replica: _Replica) -> None:
        self._inner = inner
        self._replica: _Replica | None = replica

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._inner:
            yield piece

    async def aclose(self) -> None:
        if self._replica is not None:
            self._replica.running -= 1
            self._replica = None
        await self._inner.aclose()


def replica_client(urls: str, *, timeout: httpx.Timeout, limits: httpx.Limits) -> httpx.AsyncClient:
    """A client for one or more servers, `urls` separated by commas."""
    transport = ReplicaTransport(urls, httpx.AsyncHTTPTransport(limits=limits))
    return httpx.AsyncClient(base_url=transport.base_url, transport=transport, timeout=timeout)
