"""What the services say to each other through the queue: a type a message, an example with each.

    gateway ──PromptQueued──▶ sipo:prompts ──▶ generation worker ──PromptSampled──▶ sipo:candidates ──▶ scorer
    scorer ──PromptDecided──▶ sipo:decisions ──▶ trainer

Messages are facts about ONE prompt of one round of one job, with everything the next stage needs: no stage joins messages.
Which prompt that is, `job`, `round` and `prompt` of every message say; `id` is the three together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

from pydantic import Field

from sipo.preferences import Example, SamplingMode, Weights
from sipo.record import Record
from sipo.selection import Chosen, Filter, Rewards


class SamplingPlan(Record):
    """How candidates are made for every prompt of a job (Eq. 3-5)."""

    sampling_set: str = Field(description="policy set that samples, reviews and rewrites, e.g. 'demo:1'")
    reward_set: str = Field(description="policy set whose implicit rewards decide, e.g. 'demo:1'")
    weights: list[Weights] = Field(min_length=1, description="W without its vertices: one sample each")
    review_weights: Weights = Field(description="w_e of Eq. 4")
    mode: SamplingMode = Field(default="mod", description="how the policies are joined at a weight")
    refine: bool = Field(description="False: samples only, no review and rewrite (the paper's SIPO - refine)")
    samples_per_weight: int = Field(ge=1, le=16)
    teachers: dict[str, int] = Field(default={}, description="answers of each teacher (SIPO_TEACHERS) beside the policies' samples")
    temperature: float = Field(ge=0)
    seed: int
    max_tokens: int = Field(ge=1, description="longest response")
    review_max_tokens: int = Field(ge=1, description="longest review")
    filter: Filter = Field(default=Filter(), description="how the scorer chooses among the candidates (Eq. 7)")


class AboutPrompt(Protocol):
    """What every message can tell, from a field of its own or from the message inside it."""

    @property
    def job(self) -> str: ...

    @property
    def round(self) -> int: ...

    @property
    def prompt(self) -> str: ...


class _Message(Record):
    version: Literal[1] = 1

    @property
    def id(self: AboutPrompt) -> str:
        """The message's identity in every stage: effects are done once per id."""
        return f"{self.job}/{self.round}/{self.prompt}"


class PromptQueued(_Message):
    """A prompt waits for candidates.

    >>> PromptQueued(job="job-1", round=1, prompt="12", example=Example(...), plan=SamplingPlan(...)).id
    'job-1/1/12'
    """

    job: str
    round: int = Field(ge=1)
    prompt: str = Field(description="the prompt's id within the job: its row in the job's input, from 0")
    example: Example
    plan: SamplingPlan


class Candidate(Record):
    """One response that might beat both originals."""

    text: str
    token_ids: list[int] = Field(
        description="as the decoder made them, the end token included where it ended by itself; empty if it was made elsewhere"
    )
    finish_reason: str = Field(
        description="'stop' or 'length', as vLLM says it; a teacher's own word for any other end, and then the text is empty"
    )
    weights: Weights | None = Field(description="w_m under which it was made; None if it is a teacher's, who knows no weights")
    stage: Literal["sample", "rewrite", "distilled"]
    review: str | None = Field(default=None, description="the review y^v that a rewrite followed")
    teacher: str | None = Field(default=None, description="who wrote it, if it is distilled: a name of SIPO_TEACHERS")


class PromptSampled(_Message):
    """All candidates of one prompt: ready for scoring. A rewrite comes right after the sample that it rewrites; what teachers wrote
    comes last."""

    queued: PromptQueued
    candidates: list[Candidate]

    @property
    def job(self) -> str:
        return self.queued.job

    @property
    def round(self) -> int:
        return self.queued.round

    @property
    def prompt(self) -> str:
        return self.queued.prompt


class ScoredCandidate(Record):
    candidate: Candidate
    rewards: Rewards | None = Field(description="None where the candidate was rejected before scoring")
    rejected: str | None = Field(description="None for the chosen ones, otherwise the rule that rejected it")


class PromptDecided(_Message):
    """The outcome for one prompt: exactly one message per prompt and round.

    'accepted': the chosen candidates passed the job's filter (Eq. 7); 'none': no candidate did; 'failed': `error` says why no
    decision could be made.
    """

    job: str
    round: int
    prompt: str
    outcome: Literal["accepted", "none", "failed"]
    example: Example
    chosen: list[Chosen] = Field(default=[], description="the best first")
    candidates: list[ScoredCandidate] = Field(default=[])
    rewards_0: Rewards | None = Field(default=None, description="of example.response_0 (y_-1)")
    rewards_1: Rewards | None = Field(default=None, description="of example.response_1 (y_1)")
    error: str | None = None

    def accepted(self) -> Iterator[tuple[Candidate, str | None]]:
        """Each chosen response, and the one objective that it was chosen for (None: all)."""
        for choice in self.chosen:
            yield self.candidates[choice.candidate].candidate, choice.objective


Message = PromptQueued | PromptSampled | PromptDecided
"""What the streams carry, in the order of a prompt's way."""
