"""Joins the gateway's parts: what the routes work with, and the feeder that runs beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
from fastapi import FastAPI, Request, Response
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.jobs.feeder import Feeder
from gateway.routes import completions, evaluations, jobs, models
from gateway.routes import queue as queue_routes
from gateway.settings import GatewaySettings
from services.common.background import beside
from services.common.contract.evaluation_store import EvaluationStore
from services.common.contract.job_store import JobStore
from services.common.queue import Queue, unanswered
from services.common.web import app as common
from sipo.errors import Unavailable


def create_app(settings: GatewaySettings, decoder: httpx.AsyncClient, redis: Redis) -> FastAPI:
    """`decoder` has the decoder's base URL; both clients are closed when the application ends."""
    job_store = JobStore(redis)
    queue = Queue(redis)
    feeder = Feeder(queue, job_store, settings.jobs_dir)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with beside(feeder.run(), queue.tend()):
            yield
        await decoder.aclose()
        await redis.aclose()

    app = common.create_app("gateway", settings, lifespan, partial(unanswered, redis))
    app.state.policies = settings.policies
    app.state.jobs = job_store
    app.state.evaluations = EvaluationStore(redis)
    app.state.queue = queue
    app.state.decoder = decoder
    app.add_exception_handler(RedisConnectionError, _queue_server_away)
    for routes in (completions, models, jobs, evaluations, queue_routes):
        app.include_router(routes.router)
    return app


async def _queue_server_away(_request: Request, _error: Exception) -> Response:
    return common.error_response(Unavailable("the queue server does not answer; try again soon"))
