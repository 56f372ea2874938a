"""The web side that every service shares: error bodies in OpenAI's shape, request ids, health, readiness, metrics, serving.

It knows nothing about what a service does: routes are added to the application that `create_app` returns.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from uuid import uuid4

import structlog
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from services.common.background import for_the_operator, give_up
from services.common.settings import CommonSettings
from sipo.errors import SipoError, Unavailable

log = structlog.get_logger(__name__)

REQUESTS_GRACE = 15.0
"""Seconds that requests in flight have to end after SIGTERM; the supervisor and the compose file allow for more."""

JSONL = "application/jsonl"

REQUEST_SECONDS = Histogram("sipo_http_request_seconds", "From request to the last byte", ["method", "route", "status"])

_UNTOLD = ("/health", "/ready", "/metrics")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

Readiness = Callable[[], Awaitable[str | None]]
"""None when the service can do its work, otherwise the reason why not (yet)."""


def create_app(
    name: str, settings: CommonSettings, lifespan: Lifespan[FastAPI] | None = None, ready: Readiness | None = None
) -> FastAPI:
    """An application with /health (the process lives), /ready (503 and the reason until `ready` gives None) and /metrics."""
    app = FastAPI(title=f"SIPO {name}", lifespan=lifespan)
    app.state.settings = settings
    app.add_middleware(Requests)
    app.add_exception_handler(SipoError, _sipo_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive", "service": name}

    @app.get("/ready")
    async def readiness() -> dict[str, str]:
        if ready and (reason := await ready()):
            raise Unavailable(f"the {name} is not ready: {reason}", retry_after=1)
        return {"status": "ready", "service": name}

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


def error_body(message: str, status: int, code: str, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object; also what a stream that has begun sends as its last event."""
    if status >= 500:
        kind = "server_error"
    else:
        kind = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error"
        )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sipo_error_body(error: SipoError) -> dict[str, dict[str, str | None]]:
    return error_body(error.message, error.status, error.code, error.param)


def error_response(error: SipoError) -> Response:
    return JSONResponse(sipo_error_body(error), error.status, retry_header(error))


def retry_header(error: SipoError) -> dict[str, str]:
    """When to come back, in whole seconds, if the error says so."""
    return {"Retry-After": f"{error.retry_after:.0f}"} if isinstance(error, Unavailable) else {}


async def _sipo_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SipoError)
    return error_response(error)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first, *others = error.errors()
    # loc is ("body", "messages", 0, "role"); for bytes that are no JSON it is ("body", position)
    path = [str(part) for part in first["loc"][1:]] if first["type"] != "json_invalid" else []
    param = ".".join(path) or None
    what = f"{first['msg']}: {first['ctx']['error']}" if first["type"] == "json_invalid" else first["msg"]
    message = f"{param}: {what}" if param else what
    if others:
        message += f" (and {len(others)} more)"
    return JSONResponse(error_body(message, 400, "invalid_request", param), 400)


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    return JSONResponse(error_body(str(error.detail), error.status_code, code), error.status_code, error.headers)


class Requests:
    """Around every request: its id (the caller's or a new one; on each log line and in the reply), a log line, a measurement, and
    the reply to an error that nobody foresaw. Plain ASGI, because starlette's BaseHTTPMiddleware does not let streams pass well."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        callers_id = Headers(scope=scope).get("x-request-id", "")
        request_id = callers_id if _REQUEST_ID.fullmatch(callers_id) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, begin = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            except Exception:
                log.exception("unforeseen error", method=scope["method"], path=scope["path"])
                if status:  # the reply has begun: only breaking it off tells the caller
                    raise
                message = f"an error on our side; the log has it under request id {request_id}"
                await JSONResponse(error_body(message, 500, "internal_error"), 500)(scope, receive, send_with_id)
            finally:
                seconds = time.perf_counter() - begin
                if scope["path"] not in _UNTOLD:
                    route = getattr(scope.get("route"), "path", "unknown")
                    REQUEST_SECONDS.labels(scope["method"], route, str(status)).observe(seconds)
                    log.info("request", method=scope["method"], path=scope["path"], status=status, seconds=round(seconds, 4))


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM; then ends what runs (at most REQUESTS_GRACE seconds) and the lifespan, and returns.

    What the process was given and cannot work with, such as a folder that is no model, ends it with status 2 and one sentence.
    """
    app.router.lifespan_context = _plain_spoken(app.router.lifespan_context)
    uvicorn.run(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=int(REQUESTS_GRACE))


def _plain_spoken(lifespan: Lifespan[FastAPI]) -> Lifespan[FastAPI]:
    @asynccontextmanager
    async def started(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(lifespan(app))
            except Exception as error:
                if sentence := for_the_operator(error):
                    give_up(sentence)
                raise
            yield

    return started
