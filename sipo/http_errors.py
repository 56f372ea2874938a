"""What goes wrong at a server elsewhere, as our own errors: for every client of our services, and of the endpoints of others.

Our own services speak OpenAI's error shape, and their words reach the caller as they are. What an endpoint of somebody else says is
quoted. Nothing is retried here: callers know whether to. (The way back, from our errors to HTTP, is services.common.web.app.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sipo.errors import Conflict, InvalidRequest, NotFound, SipoError, Unavailable

AWAY = frozenset({429, 502, 503, 504})
"""Statuses of a server that is full, down, starting or asleep: the same request may work later."""

LONGEST_WAIT = 3600.0
"""Most seconds that a Retry-After is believed: after so long it is worth another look in any case."""

QUOTED = 300
"""Most characters of a reply in an unknown shape that a message quotes."""


@contextmanager
def asking(server: str) -> Iterator[None]:
    """Around one request to `server` ("the decoder"): raises Unavailable if it does not answer, SipoError if its answer is no HTTP
    that can be read."""
    try:
        yield
    except httpx.TransportError as error:
        raise Unavailable(f"{server} does not answer ({type(error).__name__})") from error
    except httpx.RequestError as error:
        raise SipoError(f"{server} sent what cannot be read: {error}") from error


def service_error(reply: httpx.Response, service: str) -> SipoError:
    """The error that one of our own services sent, with its words and `param`.

    Unavailable for the statuses of AWAY; the caller's mistakes as NotFound, Conflict or InvalidRequest. Anything else is a
    SipoError: also a 4xx that is not in our services' shape, as then it is not `service` that answers.
    """
    sent = openai_error(reply)
    message = f"{service} answered HTTP {reply.status_code} {reply.reason_phrase}" if sent is None else sent["message"]
    if reply.status_code in AWAY:
        return _unavailable(message, reply)
    if sent is None:
        return SipoError(message)
    if reply.is_server_error:
        return SipoError(f"{service} failed: {message}")
    kind = {404: NotFound, 409: Conflict}.get(reply.status_code, InvalidRequest)
    return kind(message, param=sent.get("param"))


def endpoint_error(
    reply: httpx.Response,
    endpoint: str,
    *,
    away: Collection[int] = AWAY,
    refusal: type[SipoError] = SipoError,
    secret: str | None = None,
) -> SipoError:
    """The error of an endpoint that is not ours, with its status and what it says.

    Unavailable for the statuses in `away`, `refusal` for the other 4xx: who is to blame for those depends on who wrote the request.
    `secret` is kept out of the message.
    """
    message = f"{endpoint} answered HTTP {reply.status_code}: {quoted(reply, secret) or reply.reason_phrase}"
    if reply.status_code in away:
        return _unavailable(message, reply)
    return refusal(message) if reply.is_client_error else SipoError(message)


def openai_error(reply: httpx.Response) -> dict[str, Any] | None:
    """The error object of a reply in OpenAI's shape, {"error": {"message": …, "type": …, "param": …, "code": …}}. Only its message
    is sure to be there."""
    try:
        error = reply.json()["error"]
        return error if isinstance(error["message"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def quoted(reply: httpx.Response, secret: str | None = None) -> str:
    """What a reply says, on one line: the message of OpenAI's shape, otherwise its beginning. Some endpoints repeat a key that they
    refuse, so `secret` is blotted out."""
    error = openai_error(reply)
    text: str = reply.text if error is None else error["message"]
    if secret:
        text = text.replace(secret, "**********")
    return " ".join(text.split())[:QUOTED]


def retry_after(reply: httpx.Response) -> float | None:
    """The seconds of a reply's Retry-After, which is a number or a date (RFC 9110, 10.2.3), at most LONGEST_WAIT. None if there is
    none, or it makes no sense: no number, below 0, past."""
    value = reply.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        # HTTP knows no other time than UTC; only "-0000" comes without a zone.
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(seconds, LONGEST_WAIT) if seconds >= 0 else None


def _unavailable(message: str, reply: httpx.Response) -> Unavailable:
    seconds = retry_after(reply)
    return Unavailable(message) if seconds is None else Unavailable(message, retry_after=seconds)
