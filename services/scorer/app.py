"""The scorer's two doors to one model: POST /v1/rewards, and the consumers that turn candidates into decisions."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Literal, Self

from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from redis.asyncio import Redis

from services.common.contract.keys import CANDIDATES, DECISIONS
from services.common.contract.messages import PromptSampled
from services.common.queue import Consumer, Delivery, consuming, each, unanswered
from services.common.web import app as common
from services.scorer.scoring import Asked, Given, Scorer, as_failed
from services.scorer.settings import ScorerSettings
from sipo.conversation import Prompt
from sipo.errors import SipoError
from sipo.preferences import Weights, format_weights
from sipo.selection import Rewards

MAX_RESPONSES = 16384


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
    prompt: Prompt = Field(description="a text or a conversation")
    responses: list[ResponseToScore] = Field(min_length=1, max_length=MAX_RESPONSES)
    weights: list[Weights] = Field(default=[], max_length=32, description="soups to score with, beside the policies")
    length_normalized: bool = Field(default=False, description="rewards per token of the response, not summed")
    stream: bool = Field(
        default=False, description="answer in JSONL: a RewardsHeader, then a ScoredResponse a line, as they are done"
    )


class RewardsHeader(BaseModel):
    policy_set: str = Field(description="the id of the set that is used")
    names: list[str] = Field(description="of the rewards: policies, then soups")


class RewardsReply(RewardsHeader):
    """Implicit rewards (Eq. 6), one dictionary a response, in the order of the request."""

    rewards: list[Rewards]


class ScoredResponse(BaseModel):
    """A line of a stream. One that breaks off ends with a line `{"error": …}`."""

    index: int = Field(description="of the response in the request")
    rewards: Rewards


def create_app(settings: ScorerSettings, redis: Redis) -> FastAPI:
    """The application is up when the models are loaded, which may take long. Closes `redis` when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(redis.aclose)
            scorer = await stack.enter_async_context(Scorer.open(settings))
            app.state.scorer = scorer

            async def decide(delivery: Delivery[PromptSampled]) -> None:
                await delivery.hand_on(DECISIONS, await scorer.decide(delivery.message))

            # One consumer a message, so that one that is decided makes room for the next at once.
            consumers = [
                Consumer(redis, CANDIDATES, model=PromptSampled, batch=1, on_dead=as_failed)
                for _place in range(settings.scorer_messages)
            ]
            await stack.enter_async_context(consuming(consumers, each(decide)))
            yield

    app = common.create_app("scorer", settings, lifespan, partial(unanswered, redis))
    app.post("/v1/rewards", response_model=RewardsReply)(rewards)
    return app


def _scorer(request: Request) -> Scorer:
    scorer: Scorer = request.app.state.scorer
    return scorer


async def rewards(request: RewardsRequest, scorer: Annotated[Scorer, Depends(_scorer)]) -> RewardsReply | StreamingResponse:
    """All of a request is checked before its first response is scored."""
    responses = [Given(response.text, response.token_ids, ended=response.finish_reason == "stop") for response in request.responses]
    asked = await asyncio.to_thread(scorer.ask, request.policy_set, request.prompt, responses, request.weights)
    header = RewardsHeader(policy_set=asked.policy_set, names=[*asked.objectives, *map(format_weights, asked.soups)])
    finite = _finite(asked, scorer.rewards(asked, length_normalized=request.length_normalized))
    if request.stream:
        return StreamingResponse(_lines(header, finite), media_type=common.JSONL)
    return RewardsReply(**header.model_dump(), rewards=[rewards async for rewards in finite])


async def _finite(asked: Asked, batches: AsyncIterator[list[Rewards]]) -> AsyncIterator[Rewards]:
    """Of each response, in order."""
    async for batch in batches:
        for rewards in batch:
            if not all(map(math.isfinite, rewards.values())):
                raise SipoError(f"{asked.policy_set} gives rewards that are not finite: its adapters, or the base, are damaged")
            yield rewards


async def _lines(header: RewardsHeader, all_rewards: AsyncIterator[Rewards]) -> AsyncIterator[str]:
    yield header.model_dump_json() + "\n"
    index = 0
    try:
        async for rewards in all_rewards:
            yield ScoredResponse(index=index, rewards=rewards).model_dump_json() + "\n"
            index += 1
    except SipoError as error:
        yield json.dumps(common.sipo_error_body(error)) + "\n"
