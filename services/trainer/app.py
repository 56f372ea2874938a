"""Joins the trainer's parts: the lease, the consumer of decisions, and the jobs' lifecycle, behind /health, /ready and /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from redis.asyncio import Redis

from services.common.background import beside
from services.common.contract.job_store import JobStore
from services.common.contract.messages import PromptDecided
from services.common.local.training import launch_command
from services.common.queue import DECISIONS, Consumer, unanswered
from services.common.web import app as common
from services.trainer.decoders import decoder_clients
from services.trainer.lifecycle import Lifecycle
from services.trainer.rounds import Base, Stages
from services.trainer.settings import TrainerSettings
from sipo.models import model_sha256, resolve_model
from sipo.policies import BaseModelRef
from sipo.prompts import PromptFormat

TRAINER_LEASE = "trainer"
BATCH = 64


def open_base(settings: TrainerSettings) -> Base:
    """Finds the base model; its weights stay on disk, training runs load them."""
    from transformers import AutoTokenizer

    folder = resolve_model(settings.model, settings.cache_dir)
    ref = BaseModelRef(name=settings.model, sha256=model_sha256(folder, settings.cache_dir))
    return Base(folder, ref, PromptFormat.of(AutoTokenizer.from_pretrained(folder)))


def create_app(settings: TrainerSettings, redis: Redis, *, lease_seconds: float = 30.0) -> FastAPI:
    """Closes `redis` when the application ends. Only one trainer works at a time; others wait, and are not ready."""
    state = {"waiting": "the base model is being looked up"}

    async def work() -> None:
        base = await asyncio.to_thread(open_base, settings)
        command = launch_command(settings.trainer_accelerate, gpu_memory=settings.trainer_gpu_memory)
        stages = Stages(base, settings.policies, settings.jobs_dir, command)
        jobs = JobStore(redis)
        state["waiting"] = "another trainer holds the lease"
        async with AsyncExitStack() as stack, jobs.lease(TRAINER_LEASE, lease_seconds) as lease:
            clients = decoder_clients(settings.decoder_url) if settings.decoder_sleeps else []
            decoders = [await stack.enter_async_context(client) for client in clients]
            lifecycle = Lifecycle(stages, jobs, lease, decoders)
            consumer = Consumer(redis, DECISIONS, model=PromptDecided, batch=BATCH)
            async with consumer.running(lifecycle.keep):
                del state["waiting"]
                await lifecycle.run()
        raise RuntimeError("the lease was lost")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            async with beside(work()):
                yield
        finally:
            await redis.aclose()

    async def ready() -> str | None:
        return await unanswered(redis) or state.get("waiting")

    return common.create_app("trainer", settings, lifespan, ready)
