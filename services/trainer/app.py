"""Joins the trainer's parts: the lease, the consumer of decisions, the jobs' lifecycle and the evaluations, behind /health, /ready
and /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from redis.asyncio import Redis

from services.common.background import beside
from services.common.contract.evaluation_store import EvaluationStore
from services.common.contract.job_store import JobStore
from services.common.contract.keys import DECISIONS
from services.common.contract.messages import PromptDecided
from services.common.local.training import launch_command, run_child
from services.common.queue import Consumer, unanswered
from services.common.web import app as common
from services.common.web.clients import DecoderClient
from services.trainer.evaluations import Evaluations
from services.trainer.evaluator import Evaluator
from services.trainer.lifecycle import Lifecycle
from services.trainer.rounds import Stages
from services.trainer.settings import TrainerSettings
from sipo.models import Base

TRAINER_LEASE = "trainer"
BATCH = 64


def open_stages(settings: TrainerSettings) -> Stages:
    """With the base model, whose weights stay on disk: training runs load them."""
    base = Base.open(settings.model, settings.cache_dir)
    base.prompt_format.check(base.tokenizer)  # here its tokenizer is loaded: a base without one ends the start, not the first job
    command = launch_command(settings.trainer_accelerate, gpu_memory=settings.trainer_gpu_memory)
    run_training = partial(run_child, command=command)
    return Stages(base, settings.policies, settings.jobs_dir, run_training, evaluator=Evaluator(settings))


def create_app(
    settings: TrainerSettings,
    redis: Redis,
    open_stages: Callable[[TrainerSettings], Stages],
    decoders: Sequence[DecoderClient],
    *,
    lease_seconds: float = 30.0,
) -> FastAPI:
    """`open_stages` may take its time, in a thread; `decoders` are those that sleep while policies are trained. Closes `redis` and
    `decoders` when the application ends. Only one trainer works at a time; others wait, and are not ready."""
    state = {"waiting": "the base model is being looked up"}

    async def work() -> None:
        stages = await asyncio.to_thread(open_stages, settings)
        jobs = JobStore(redis)
        state["waiting"] = "another trainer holds the lease"
        async with jobs.lease(TRAINER_LEASE, lease_seconds) as lease:
            lifecycle = Lifecycle(stages, jobs, lease, decoders)
            evaluations = Evaluations(stages.evaluator, EvaluationStore(redis), lease, lifecycle.turn)
            consumer = Consumer(redis, DECISIONS, model=PromptDecided, batch=BATCH)
            async with consumer.running(lifecycle.keep), beside(evaluations.run()):
                del state["waiting"]
                await lifecycle.run()
        raise RuntimeError("the lease was lost")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(redis.aclose)
            for decoder in decoders:
                await stack.enter_async_context(decoder)
            async with beside(work()):
                yield

    async def ready() -> str | None:
        return await unanswered(redis) or state.get("waiting")

    return common.create_app("trainer", settings, lifespan, ready)
