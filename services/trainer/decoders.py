"""The decoders that share a GPU with the training, and give its memory up for that time. How they do is theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import structlog

from services.common.background import begin, end_tasks
from services.common.web.clients import DecoderClient
from sipo.errors import Conflict, SipoError, Unavailable

log = structlog.get_logger(__name__)

SLEEP_SECONDS = 60.0
"""Seconds after which a decoder that nobody asks any more wakes: the trainer was killed, and its training with it."""
ASK_AGAIN_SECONDS = 10.0
"""Seconds between two times that they are asked."""
DRAIN_POLL_SECONDS = 1.0
"""The same while they do not sleep yet."""
ANSWER_TIMEOUT = httpx.Timeout(5)


def decoder_clients(urls: str) -> list[DecoderClient]:
    """One for each of `urls`, which are separated by commas."""
    return [DecoderClient(url.strip(), timeout=ANSWER_TIMEOUT) for url in urls.split(",")]


@asynccontextmanager
async def asleep(decoders: Sequence[DecoderClient], lost: asyncio.Event) -> AsyncIterator[None]:
    """The body runs while all `decoders` sleep; it begins when their answers under way have ended, and they wake at its end. Once
    this trainer's lease is `lost`, its successor decides about that.

    Raises Conflict if one of them is not allowed to sleep.
    """
    renewing: list[asyncio.Task[None]] = []
    try:
        if not await _all_asleep(decoders):
            log.info("training waits until the decoders sleep: what they are answering ends first")
            while not await _all_asleep(decoders):  # noqa: ASYNC110, they are in other processes
                await asyncio.sleep(DRAIN_POLL_SECONDS)
        renewing = [begin(_keep_asleep(decoder)) for decoder in decoders]
        yield
    finally:
        await end_tasks(*renewing)
        if not lost.is_set():
            await asyncio.gather(*map(_wake, decoders))


async def _all_asleep(decoders: Sequence[DecoderClient]) -> bool:
    return all(await asyncio.gather(*map(_asleep, decoders)))


async def _asleep(decoder: DecoderClient) -> bool:
    """Asks it to sleep; True if it holds no memory."""
    try:
        return await decoder.sleep(SLEEP_SECONDS) == "asleep"
    except Unavailable as error:
        away = isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
        if away:
            log.info("no decoder there", url=decoder.url)
        return away
    except Conflict as error:
        raise Conflict(f"the decoder at {decoder.url} does not sleep while policies are trained: {error.message}") from error
    except SipoError as error:
        log.warning("a decoder does not say whether it sleeps", url=decoder.url, reason=error.message)
        return False


async def _keep_asleep(decoder: DecoderClient) -> None:
    """Until cancelled. What goes wrong now is no reason to give a training up: it has the memory, or notices that it has not."""
    while True:
        await asyncio.sleep(ASK_AGAIN_SECONDS)
        try:
            if not await _asleep(decoder):
                log.warning("a decoder does not sleep during a training", url=decoder.url)
        except Conflict as error:
            log.warning("a decoder does not sleep during a training", url=decoder.url, reason=error.message)


async def _wake(decoder: DecoderClient) -> None:
    try:
        await decoder.wake()
    except SipoError as error:
        log.info("the decoder was not woken", url=decoder.url, reason=error.message)
