"""The reviewer's routes: criticise a response (Eq. 4) and write a better one (Eq. 5), each with one call to a decoder.

It chooses the template set and the form of the prompt, and reads the answer; how text is made is the decoder's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from services.common.web import app as common
from services.common.web.clients import JOB_PRIORITY, Completion, DecoderClient
from services.reviewer.settings import ReviewerSettings
from sipo.conversation import Prompt
from sipo.models import resolve_model
from sipo.policies import PolicySet
from sipo.preferences import ObjectiveName, SamplingMode, Weights, normalize_weights
from sipo.refinement import Task, TemplateBook

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReviewRequest(BaseModel):
    """Asks for y^v, the review of `response`."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt = Field(description="x, a text or a conversation")
    response: str = Field(description="y^s")
    objectives: list[ObjectiveName] = Field(min_length=2, description="what to improve; chooses the template set")
    weights: Weights = Field(description="joins the policies: w_e for a review, w_m for a rewrite")
    policy_set: str = Field(description="'demo:2', or 'demo' for its current set")
    mode: SamplingMode = Field(default="mod", description="how the policies are joined")
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.7, ge=0, le=2)
    seed: int | None = None


class RewriteRequest(ReviewRequest):
    """Asks for y^a, `response` rewritten."""

    review: str = Field(description="y^v; may be empty")


class Review(BaseModel):
    review: str = Field(description="empty if the decoder wrote nothing that belongs to this answer")
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


class Rewrite(BaseModel):
    text: str = Field(description="empty if the decoder wrote nothing that belongs to this answer")
    token_ids: list[int] = Field(description="of `text`, with the end token where finish_reason is 'stop'")
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


class Reviewer:
    """Joins template sets, policy sets and a decoder."""

    def __init__(self, settings: ReviewerSettings, decoder: DecoderClient) -> None:
        self.decoder = decoder
        self.templates = TemplateBook(settings.reviewer_templates)
        self._policies = settings.policies
        self.tokenizer = cache(lambda: _load_tokenizer(settings))

    async def review(self, request: ReviewRequest) -> Review:
        policies = self._policies.get(request.policy_set)
        template = self.templates.find(request.objectives)
        task = template.review_task(request.objectives, request.prompt, request.response)
        written = await self._write(task, policies, request)
        parsed = task.parse(written.text)
        return Review(
            review=parsed.text,
            finish_reason="stop" if parsed.cut or written.finish_reason != "length" else "length",
            prompt_tokens=written.prompt_tokens,
        )

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        policies = self._policies.get(request.policy_set)
        template = self.templates.find(request.objectives)
        task = template.rewrite_task(request.objectives, request.prompt, request.response, request.review)
        written = await self._write(task, policies, request)
        parsed = task.parse(written.text)
        ended = parsed.cut or written.finish_reason != "length"
        tokenizer = await run_in_threadpool(self.tokenizer)
        token_ids, format = written.token_ids, policies.manifest.prompt_format
        # The decoder's own tokens, unless they are of more than the text, or it ended without the end token (at a stop string).
        if parsed.text != written.text or (ended and token_ids[-1:] != [format.end_token_id(tokenizer)]):
            token_ids = format.response_ids(parsed.text, tokenizer, ended=ended)
        return Rewrite(
            text=parsed.text,
            token_ids=token_ids,
            finish_reason="stop" if ended else "length",
            prompt_tokens=written.prompt_tokens,
        )

    async def _write(self, task: Task, policies: PolicySet, request: ReviewRequest) -> Completion:
        chat = policies.manifest.prompt_format.kind == "chat"
        [completion] = await self.decoder.chat(
            task.messages() if chat else task.text(),
            weights=normalize_weights(request.weights, policies.objectives, param="weights"),
            policy_set=policies.id,
            mode=request.mode,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            priority=JOB_PRIORITY,
            stop=None if chat else task.stop,  # a chat ends its turns by itself; one text would go on with examples of its own
        )
        return completion


def create_app(settings: ReviewerSettings, decoder: DecoderClient) -> FastAPI:
    """Raises InvalidRequest for template files that cannot be used."""
    reviewer = Reviewer(settings, decoder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(reviewer.tokenizer)
        async with decoder:
            yield

    app = common.create_app("reviewer", settings, lifespan, decoder.ready)
    app.state.reviewer = reviewer
    app.post("/v1/reviews")(review)
    app.post("/v1/rewrites")(rewrite)
    return app


def _reviewer(request: Request) -> Reviewer:
    reviewer: Reviewer = request.app.state.reviewer
    return reviewer


TheReviewer = Annotated[Reviewer, Depends(_reviewer)]


async def review(request: ReviewRequest, reviewer: TheReviewer) -> Review:
    return await reviewer.review(request)


async def rewrite(request: RewriteRequest, reviewer: TheReviewer) -> Rewrite:
    return await reviewer.rewrite(request)


def _load_tokenizer(settings: ReviewerSettings) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_model(settings.model, settings.cache_dir))
    return tokenizer
