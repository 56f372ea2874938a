"""From messages to token ids to rewards to decisions: joins the reward model (Eq. 6), prompt formats and selection (Eq. 7).

Everything here blocks: services.scorer.app calls it from the one thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import structlog
import torch
from transformers import AutoTokenizer

from services.common.messages import PromptDecided, PromptSampled, Rewards, ScoredCandidate
from services.common.queue import DECISIONS
from services.scorer.settings import ScorerSettings
from sipo.models import model_sha256, resolve_model
from sipo.policies import PolicyStore
from sipo.preferences import Weights
from sipo.prompts import PromptFormat
from sipo.rewards import RewardModel
from sipo.selection import Rejection, Response, screen, select

log = structlog.get_logger(__name__)

Outcome = Literal["accepted", "none", "failed"]


@dataclass(frozen=True)
class Given:
    """A response as text or as token ids; `ended`: by itself, so that its end token counts."""

    text: str | None = None
    token_ids: list[int] | None = None
    ended: bool = True


class Scorer:
    def __init__(self, model: RewardModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, settings: ScorerSettings) -> Scorer:
        torch.set_num_threads(settings.scorer_threads)
        device = settings.scorer_device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = resolve_model(settings.model, settings.cache_dir)
        model = RewardModel.load(
            folder,
            PolicyStore(settings.data_dir / "policies"),
            base_sha256=model_sha256(folder, settings.cache_dir),
            device=device,
            keep=settings.scorer_resident_sets,
        )
        log.info("model loaded", model=settings.model, device=device, threads=settings.scorer_threads)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def prompt_format(self, policy_set: str) -> PromptFormat:
        prompt_format = self.model.policy_set(policy_set).manifest.prompt_format
        prompt_format.check(self.tokenizer)
        return prompt_format

    def rewards(self, policy_set: str, prompt: str, responses: Sequence[Given], soups: Sequence[Weights]) -> list[Rewards]:
        """Of each response to the prompt under every policy of the set and every soup (Eq. 6)."""
        prompt_format = self.prompt_format(policy_set)
        ids = [self._ids(one, prompt_format) for one in responses]
        return self.model.score(policy_set, prompt_format.prompt_ids(prompt, self.tokenizer), ids, soups)

    def decide(self, sampled: PromptSampled) -> PromptDecided:
        """Eq. 7 for one prompt. Raises SipoError or ValueError if it cannot be decided."""
        queued = sampled.queued
        originals = (queued.example.response_0, queued.example.response_1)
        screened = screen(originals, [Response(one.text, truncated=one.finish_reason != "stop") for one in sampled.candidates])
        kept = [candidate for candidate, rejection in zip(sampled.candidates, screened, strict=True) if rejection is None]
        if not kept:
            return _decided(sampled, "none", _scored(sampled, [None] * len(screened), screened))

        responses = [*(Given(text=text) for text in originals), *(Given(token_ids=one.token_ids) for one in kept)]
        # The vertices of W are the policies themselves: they would count twice in the average.
        soups = [weights for weights in queued.plan.weights if max(weights.values()) < 1]
        first, second, *others = self.rewards(queued.plan.reward_set, queued.example.prompt, responses, soups)
        remaining = iter(others)
        outcomes = [rejection or next(remaining) for rejection in screened]
        selection = select((first, second), outcomes)
        rewards = [None if isinstance(one, Rejection) else one for one in outcomes]
        return _decided(
            sampled,
            "none" if selection.chosen is None else "accepted",
            _scored(sampled, rewards, selection.rejections),
            chosen=selection.chosen,
            rewards_0=first,
            rewards_1=second,
        )

    def _ids(self, response: Given, prompt_format: PromptFormat) -> list[int]:
        if response.text is not None:
            return prompt_format.response_ids(response.text, self.tokenizer, ended=response.ended)
        ids = response.token_ids or []
        end = prompt_format.end_token_id(self.tokenizer)
        # A decoder that stopped at a stop string leaves the end token out.
        return [*ids, end] if ids and response.ended and ids[-1] != end else ids


def as_failed(sampled: PromptSampled, reason: str) -> tuple[str, PromptDecided]:
    """What goes on to the trainer in place of a prompt that could not be decided."""
    nothing = [None] * len(sampled.candidates)
    return DECISIONS, _decided(sampled, "failed", _scored(sampled, nothing, ["not_scored"] * len(nothing)), error=reason)


def _scored(
    sampled: PromptSampled, rewards: Sequence[Rewards | None], rejections: Sequence[Rejection | str | None]
) -> list[ScoredCandidate]:
    return [
        ScoredCandidate(candidate=candidate, rewards=one, rejected=None if rejection is None else str(rejection))
        for candidate, one, rejection in zip(sampled.candidates, rewards, rejections, strict=True)
    ]


def _decided(sampled: PromptSampled, outcome: Outcome, candidates: list[ScoredCandidate], **fields: Any) -> PromptDecided:
    queued = sampled.queued
    return PromptDecided(
        job=queued.job,
        round=queued.round,
        prompt=queued.prompt,
        outcome=outcome,
        example=queued.example,
        candidates=candidates,
        **fields,
    )
