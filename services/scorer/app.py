"""The scorer's two doors to one model: POST /v1/rewards, and the consumer that turns candidates into decisions.

The model has a thread of its own. Work goes to it prompt by prompt, so that a caller waits for the prompt in hand at most, and the
event loop is free for heartbeats however long a prompt takes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Literal, Self, TypeVar

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from redis.asyncio import Redis

from services.common import app as common
from services.common.messages import PromptSampled, Rewards
from services.common.queue import CANDIDATES, DECISIONS, Consumer, Delivery, each, unanswered
from services.scorer.scoring import Given, Scorer, as_failed
from services.scorer.settings import ScorerSettings
from sipo.errors import SipoError
from sipo.preferences import Weights

T = TypeVar("T")


class ResponseToScore(BaseModel):
    """Text, or the token ids that a decoder made (the end token is added where it ended by itself and none is there)."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    token_ids: list[int] | None = Field(default=None, min_length=1)
    finish_reason: Literal["stop", "length"] = Field(default="stop", description="length: cut off, so no end token counts")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("give either text or token_ids")
        return self


class RewardsRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    policy_set: str = Field(description="'demo:2', or 'demo' for its current set")
    prompt: str = Field(min_length=1)
    responses: list[ResponseToScore] = Field(min_length=1, max_length=1024)
    weights: list[Weights] = Field(default=[], max_length=32, description="soups to score with, beside the policies")


class RewardsReply(BaseModel):
    """Implicit rewards (Eq. 6), one dictionary a response, each with the same `names`: policies, then soups."""

    policy_set: str = Field(description="the id of the set that was used")
    names: list[str]
    rewards: list[Rewards]


class ModelThread:
    """The scorer and the only thread that touches it."""

    def __init__(self, load: Callable[[], Scorer]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    async def __aenter__(self) -> Self:
        self._scorer = await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[Scorer], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._scorer)


def create_app(settings: ScorerSettings, redis: Redis, load: Callable[[], Scorer]) -> FastAPI:
    """`load` makes the scorer; it may take long, and the application is up when it is done."""
    model = ModelThread(load)

    async def decide(delivery: Delivery[PromptSampled]) -> None:
        await delivery.done(DECISIONS, await model.run(lambda scorer: scorer.decide(delivery.message)))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        consumer = Consumer(redis, CANDIDATES, model=PromptSampled, batch=settings.scorer_batch, on_dead=as_failed)
        async with redis, model, consumer.running(each(decide)):
            yield

    app = common.create_app("scorer", settings, lifespan, partial(unanswered, redis))
    app.state.model = model
    app.post("/v1/rewards")(rewards)
    return app


def _model(request: Request) -> ModelThread:
    model: ModelThread = request.app.state.model
    return model


async def rewards(request: RewardsRequest, model: Annotated[ModelThread, Depends(_model)]) -> RewardsReply:
    responses = [Given(one.text, one.token_ids, ended=one.finish_reason == "stop") for one in request.responses]

    def score(scorer: Scorer) -> RewardsReply:
        policy_set = scorer.model.policy_set(request.policy_set).id
        found = scorer.rewards(policy_set, request.prompt, responses, request.weights)
        return RewardsReply(policy_set=policy_set, names=list(found[0]), rewards=found)

    reply = await model.run(score)
    if not all(math.isfinite(value) for one in reply.rewards for value in one.values()):
        raise SipoError(f"{reply.policy_set} gives rewards that are not finite: its adapters, or the base, are damaged")
    return reply
