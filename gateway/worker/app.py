"""The generation worker: takes a prompt from the queue and hands on all its candidates. Any number of them may run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from redis.asyncio import Redis

from gateway.worker.generation import Generator, as_failed
from gateway.worker.settings import WorkerSettings
from services.common.contract.keys import CANDIDATES, PROMPTS
from services.common.contract.messages import PromptQueued
from services.common.queue import Consumer, Delivery, consuming, each, unanswered
from services.common.web import app as common
from services.common.web.clients import DecoderClient, ReviewerClient
from services.common.web.teachers import TeacherClient


def create_app(settings: WorkerSettings, redis: Redis, decoder: DecoderClient, reviewer: ReviewerClient) -> FastAPI:
    teachers = {name: TeacherClient(name, teacher) for name, teacher in settings.teachers.items()}
    generator = Generator(decoder, reviewer, settings.policies, teachers)

    async def make_candidates(delivery: Delivery[PromptQueued]) -> None:
        await delivery.hand_on(CANDIDATES, await generator.generate(delivery.message), counts={"sampled": 1})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(redis.aclose)
            await stack.enter_async_context(decoder)
            await stack.enter_async_context(reviewer)
            for teacher in teachers.values():
                stack.push_async_callback(teacher.aclose)
            # One consumer a prompt, so that a prompt that is done makes room for the next at once.
            consumers = [
                Consumer(redis, PROMPTS, model=PromptQueued, batch=1, on_dead=as_failed)
                for _place in range(settings.worker_prompts)
            ]
            await stack.enter_async_context(consuming(consumers, each(make_candidates)))
            yield

    return common.create_app("worker", settings, lifespan, partial(unanswered, redis))
