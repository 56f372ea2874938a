"""From texts to token ids to rewards to decisions: joins the reward model (Eq. 6), external reward models, prompt formats and
selection (Eq. 7)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import torch
from transformers import AutoTokenizer

from services.common.contract.keys import DECISIONS
from services.common.contract.messages import Candidate, PromptDecided, PromptSampled, ScoredCandidate
from services.scorer.passes import Passes
from services.scorer.settings import ScorerSettings
from sipo.conversation import Prompt
from sipo.errors import InvalidRequest, NotFound, SipoError
from sipo.evaluation.reward_models import RewardFunction, open_reward_model
from sipo.models import model_sha256, resolve_model
from sipo.preferences import Weights, normalize_weights
from sipo.prompts import PromptFormat
from sipo.rewards import Group, RewardModel, per_token
from sipo.selection import CandidateText, Chosen, Rejection, Rewards, Scored, keep_rewrites, screen, select

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Given:
    """A response as text, or as the token ids that a decoder made; `ended`: by itself, so that its end token counts."""

    text: str | None = None
    token_ids: list[int] | None = None
    ended: bool = True

    def ids(self, prompt_format: PromptFormat, tokenizer: Any) -> list[int]:
        """Raises InvalidRequest for text that the tokenizer cannot write."""
        if self.text is not None:
            return prompt_format.exact_response_ids(self.text, tokenizer, ended=self.ended)
        ids = self.token_ids or []
        end = prompt_format.end_token_id(tokenizer)
        # A decoder that stopped at a stop string leaves the end token out.
        return [*ids, end] if ids and self.ended and ids[-1] != end else ids


@dataclass(frozen=True)
class Asked:
    """What the reward model is asked: checked, in tokens, with the set's id."""

    policy_set: str
    objectives: list[str]
    group: Group
    soups: list[Weights]


class Scorer:
    def __init__(self, passes: Passes, tokenizer: Any, reward_models: Mapping[str, RewardFunction]) -> None:
        self.passes = passes
        self.tokenizer = tokenizer
        self.reward_models = reward_models

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: ScorerSettings) -> AsyncIterator[Scorer]:
        """Loads the base model and the external reward models; that may take long."""
        async with Passes(partial(_load, settings)) as passes:
            tokenizer = AutoTokenizer.from_pretrained(resolve_model(settings.model, settings.cache_dir))
            device = passes.model.device
            reward_models = {}
            for name, address in settings.reward_models.items():
                try:
                    reward_models[name] = await asyncio.to_thread(open_reward_model, address, device=device)
                except SipoError as error:
                    raise InvalidRequest(f"SIPO_REWARD_MODELS, {name}: {error.message}") from error
            log.info("models loaded", model=settings.model, device=device, reward_models=list(reward_models))
            yield cls(passes, tokenizer, reward_models)

    def ask(self, reference: str, prompt: Prompt, responses: Sequence[Given], soups: Sequence[Weights] = ()) -> Asked:
        """What a caller wants, ready to be scored. Blocks. Raises NotFound for an unknown set, InvalidRequest for what cannot be
        scored."""
        prompt_format, policy_set, objectives = self._format(reference)
        ids = []
        for index, response in enumerate(responses):
            try:
                ids.append(response.ids(prompt_format, self.tokenizer))
            except InvalidRequest as error:
                raise InvalidRequest(f"response {index}: {error.message}", param=error.param) from error
        group = Group(prompt_format.prompt_ids(prompt, self.tokenizer), ids)
        self.passes.model.check(group)
        return Asked(policy_set, objectives, group, [normalize_weights(weights, objectives, param="weights") for weights in soups])

    async def rewards(self, asked: Asked, *, length_normalized: bool = False) -> AsyncIterator[list[Rewards]]:
        """Of each response under every policy of the set and every soup (Eq. 6), in order, as they are done."""
        responses = iter(asked.group.responses)
        async for batch in self.passes.stream(asked.policy_set, asked.group, asked.soups):
            ids = [next(responses) for _ in batch]
            yield [per_token(rewards, tokens) for rewards, tokens in zip(batch, ids, strict=True)] if length_normalized else batch

    async def decide(self, sampled: PromptSampled) -> PromptDecided:
        """The job's filter (Eq. 7) on one prompt. Raises SipoError or ValueError if it cannot be decided."""
        example, plan = sampled.queued.example, sampled.queued.plan
        by = plan.filter
        texts = [CandidateText(candidate.text, truncated=candidate.finish_reason != "stop") for candidate in sampled.candidates]
        rejections = screen((example.response_0, example.response_1), texts, keep_truncated=by.keep_truncated)
        if by.implicit:
            rejections = await asyncio.to_thread(self._refuse_unscorable, sampled, rejections)
        kept = [candidate for candidate, rejection in zip(sampled.candidates, rejections, strict=True) if rejection is None]
        if not kept:
            return _decided(sampled, _scored(sampled, [None] * len(rejections), rejections))

        first, second, *others = await self._all_rewards(sampled, kept)
        of_kept = iter(others)
        rewards = [None if rejection else next(of_kept) for rejection in rejections]
        candidates: list[Scored] = [rejection or scores or {} for rejection, scores in zip(rejections, rewards, strict=True)]
        if by.keep_rewrite:
            names = self.passes.model.store.get(plan.reward_set).objectives if by.implicit else by.reward_models
            candidates = keep_rewrites(candidates, _rewrites(sampled.candidates), names)
        selection = select(example, (first, second), candidates, by, seed=f"{plan.seed}/{sampled.round}/{sampled.prompt}")
        scored = _scored(sampled, rewards, selection.rejections)
        return _decided(sampled, scored, chosen=selection.chosen, rewards_0=first, rewards_1=second)

    def _refuse_unscorable(self, sampled: PromptSampled, rejections: Sequence[Rejection | None]) -> list[Rejection | None]:
        """Candidates that cannot be scored are no reason to lose the prompt."""
        prompt_format, _, _ = self._format(sampled.queued.plan.reward_set)
        prompt = len(prompt_format.prompt_ids(sampled.queued.example.prompt, self.tokenizer))
        context = self.passes.model.context

        def refuse(candidate: Candidate) -> Rejection | None:
            if not candidate.token_ids and candidate.finish_reason != "stop":
                return Rejection("truncated", "made elsewhere, so its tokens are not known to the last")
            try:
                tokens = prompt + len(_given(candidate).ids(prompt_format, self.tokenizer))
            except InvalidRequest as error:
                return Rejection("not_tokenisable", error.message)
            return Rejection("too_long", f"{tokens} tokens with its prompt, at most {context}") if tokens > context else None

        return [rejection or refuse(candidate) for candidate, rejection in zip(sampled.candidates, rejections, strict=True)]

    async def _all_rewards(self, sampled: PromptSampled, kept: Sequence[Candidate]) -> list[Rewards]:
        """Of both originals and the candidates, by every model that the job's filter names."""
        example, plan = sampled.queued.example, sampled.queued.plan
        texts = [example.response_0, example.response_1, *(candidate.text for candidate in kept)]
        rewards: list[Rewards] = [{} for _ in texts]
        if plan.filter.implicit:
            responses = [Given(text=text) for text in texts[:2]] + [_given(candidate) for candidate in kept]
            # The vertices of W are the policies themselves: they would count twice in the average.
            soups = [weights for weights in plan.weights if max(weights.values()) < 1] if plan.filter.soups else []
            asked = await asyncio.to_thread(self.ask, plan.reward_set, example.prompt, responses, soups)
            batches = self.rewards(asked, length_normalized=plan.filter.length_normalized)
            rewards = [of_response async for batch in batches for of_response in batch]
        for name in plan.filter.reward_models:
            if name not in self.reward_models:
                raise NotFound(f"this scorer has no reward model {name!r}: set SIPO_REWARD_MODELS and start it again")
            scores = await asyncio.to_thread(self.reward_models[name], example.prompt, texts)
            rewards = [before | {name: score} for before, score in zip(rewards, scores, strict=True)]
        return rewards

    def _format(self, reference: str) -> tuple[PromptFormat, str, list[str]]:
        """The prompt format, the id and the objectives of a policy set."""
        model = self.passes.model
        policy_set = model.store.get(reference)
        policy_set.check_base(model.base_sha256)
        prompt_format = policy_set.manifest.prompt_format
        prompt_format.check(self.tokenizer)
        return prompt_format, policy_set.id, policy_set.objectives


def as_failed(sampled: PromptSampled, reason: str) -> tuple[str, PromptDecided]:
    """What goes on to the trainer in place of a prompt that could not be decided."""
    nothing = [None] * len(sampled.candidates)
    return DECISIONS, _decided(sampled, _scored(sampled, nothing, ["not_scored"] * len(nothing)), error=reason)


def _load(settings: ScorerSettings) -> RewardModel:
    torch.set_num_threads(settings.scorer_threads)
    if settings.scorer_tf32:
        torch.set_float32_matmul_precision("high")
    if settings.scorer_device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(settings.scorer_gpu_memory)
    folder = resolve_model(settings.model, settings.cache_dir)
    return RewardModel.load(
        folder,
        settings.policies,
        base_sha256=model_sha256(folder, settings.cache_dir),
        device=settings.scorer_device,
        keep=settings.scorer_resident_sets,
        token_budget=settings.scorer_tokens,
    )


def _given(candidate: Candidate) -> Given:
    if candidate.token_ids:
        return Given(token_ids=candidate.token_ids, ended=candidate.finish_reason == "stop")
    return Given(text=candidate.text, ended=candidate.finish_reason == "stop")


def _rewrites(candidates: Sequence[Candidate]) -> dict[int, int]:
    """The index of each rewrite, and that of its sample."""
    return {index: index - 1 for index, candidate in enumerate(candidates) if candidate.stage == "rewrite"}


def _scored(
    sampled: PromptSampled, rewards: Sequence[Rewards | None], rejections: Sequence[Rejection | str | None]
) -> list[ScoredCandidate]:
    return [
        ScoredCandidate(candidate=candidate, rewards=scores, rejected=None if rejection is None else str(rejection))
        for candidate, scores, rejection in zip(sampled.candidates, rewards, rejections, strict=True)
    ]


def _decided(
    sampled: PromptSampled,
    candidates: list[ScoredCandidate],
    *,
    chosen: Sequence[Chosen] = (),
    rewards_0: Rewards | None = None,
    rewards_1: Rewards | None = None,
    error: str | None = None,
) -> PromptDecided:
    return PromptDecided(
        job=sampled.job,
        round=sampled.round,
        prompt=sampled.prompt,
        outcome="failed" if error is not None else "accepted" if chosen else "none",
        example=sampled.queued.example,
        chosen=list(chosen),
        candidates=candidates,
        rewards_0=rewards_0,
        rewards_1=rewards_1,
        error=error,
    )
