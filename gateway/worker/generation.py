"""From a prompt to all its candidates (paper section 3.2, stages 1 and 2).

It keeps nothing: what it has when it dies is made again by another, with the same seeds.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from services.common.contract.keys import DECISIONS
from services.common.contract.messages import Candidate, PromptDecided, PromptQueued, PromptSampled, SamplingPlan
from services.common.web.clients import JOB_PRIORITY, Completion, DecoderClient, ReviewerClient
from services.common.web.teachers import TeacherClient
from sipo.conversation import Prompt, as_messages
from sipo.errors import NotFound
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Weights

T = TypeVar("T")


class Generator:
    """Makes the candidates of a prompt."""

    def __init__(
        self, decoder: DecoderClient, reviewer: ReviewerClient, policies: PolicyStore, teachers: Mapping[str, TeacherClient]
    ) -> None:
        self.decoder = decoder
        self.reviewer = reviewer
        self.policies = policies
        self.teachers = teachers

    async def generate(self, queued: PromptQueued) -> PromptSampled:
        """For every w_m of W, samples_per_weight times: a sample, and a rewrite of it; then what the teachers answer."""
        plan = queued.plan
        policies = self.policies.get(plan.sampling_set)
        chains = [
            Chain(self, queued, policies, plan.weights[m], f"{m}/{k}").candidates()
            for m in range(len(plan.weights))
            for k in range(plan.samples_per_weight)
        ]
        distilled = [self.distil(queued, policies, teacher, k) for teacher, count in plan.teachers.items() for k in range(count)]
        made = await together([*chains, *distilled])
        return PromptSampled(queued=queued, candidates=[candidate for candidates in made for candidate in candidates])

    async def distil(self, queued: PromptQueued, policies: PolicySet, teacher: str, k: int) -> list[Candidate]:
        """Answer number k of a teacher, who is asked as the policies are but for their weights; it is not rewritten."""
        if teacher not in self.teachers:
            raise NotFound(f"this worker has no teacher {teacher!r}: set SIPO_TEACHERS and start it again")
        text, finish_reason = await self.teachers[teacher].answer(
            policies.manifest.prompt_format.with_system(as_messages(queued.example.prompt)),
            max_tokens=queued.plan.max_tokens,
            temperature=queued.plan.temperature,
            seed=seed_of(queued, f"{teacher}/{k}", "distilled"),
        )
        return [Candidate(text=text, token_ids=[], finish_reason=finish_reason, weights=None, stage="distilled", teacher=teacher)]


@dataclass(frozen=True)
class Chain:
    """One sample under w_m and what comes of it. `place` is its number among the prompt's chains, for the seeds."""

    by: Generator
    queued: PromptQueued
    policies: PolicySet
    weights: Weights
    place: str

    async def candidates(self) -> list[Candidate]:
        sample = await self.sample()
        if not self.plan.refine:
            return [sample]
        review = await self.review(sample)
        return [sample, await self.rewrite(sample, review)]

    async def sample(self) -> Candidate:
        """y^s of Eq. 3, under w_m."""
        [completion] = await self.by.decoder.chat(
            self.policies.manifest.prompt_format.request(self.prompt),
            max_tokens=self.plan.max_tokens,
            weights=self.weights,
            priority=JOB_PRIORITY,
            **self._common("sample"),
        )
        return self._candidate(completion, "sample", None)

    async def review(self, sample: Candidate) -> str:
        """y^v of Eq. 4, under w_e."""
        return await self.by.reviewer.review(
            self.prompt,
            sample.text,
            objectives=self.policies.objectives,
            max_tokens=self.plan.review_max_tokens,
            weights=self.plan.review_weights,
            **self._common("review"),
        )

    async def rewrite(self, sample: Candidate, review: str) -> Candidate:
        """y^a of Eq. 5, under the w_m of its sample."""
        completion = await self.by.reviewer.rewrite(
            self.prompt,
            sample.text,
            review,
            objectives=self.policies.objectives,
            max_tokens=self.plan.max_tokens,
            weights=self.weights,
            **self._common("rewrite"),
        )
        return self._candidate(completion, "rewrite", review)

    @property
    def plan(self) -> SamplingPlan:
        return self.queued.plan

    @property
    def prompt(self) -> Prompt:
        return self.queued.example.prompt

    def _common(self, stage: str) -> dict[str, Any]:
        return {
            "policy_set": self.policies.id,
            "mode": self.plan.mode,
            "temperature": self.plan.temperature,
            "seed": seed_of(self.queued, self.place, stage),
        }

    def _candidate(self, completion: Completion, stage: Literal["sample", "rewrite"], review: str | None) -> Candidate:
        return Candidate(
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            weights=self.weights,
            stage=stage,
            review=review,
        )


def seed_of(queued: PromptQueued, place: str, stage: str) -> int:
    """The same whenever, and in whichever job, this prompt comes with this plan: a redelivery makes the same candidates."""
    name = f"{queued.plan.seed}/{queued.round}/{queued.prompt}/{place}/{stage}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1


async def together(chains: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(chain) for chain in chains]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None  # the group adds nothing, and its picture fills pages
    return [task.result() for task in tasks]


def as_failed(queued: PromptQueued, reason: str) -> tuple[str, PromptDecided]:
    """What goes on to the trainer in place of a prompt for which no candidates could be made."""
    decision = PromptDecided(
        job=queued.job, round=queued.round, prompt=queued.prompt, outcome="failed", example=queued.example, error=reason
    )
    return DECISIONS, decision
