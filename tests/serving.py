"""Applications on a port of their own, for callers that block."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp


@contextmanager
def in_a_thread(
    app: ASGIApp, *, lifespan: Literal["on", "off"] = "on", within: AbstractAsyncContextManager[Any] | None = None
) -> Iterator[str]:
    """Gives the URL. `within`: what is open while it serves, in the same event loop."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan=lifespan, log_config=None))

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            if within is not None:
                await stack.enter_async_context(within)
            await server.serve()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
