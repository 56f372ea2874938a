"""Feeds the prompts of generating jobs to the queue, in turns, so that a large job does not keep a small one waiting.

The stream is bounded: a job's prompts wait in its input file and are added as there is room. A prompt is added, and the job's
cursor moved, in one step of the queue, so any number of gateways may feed, and one that dies leaves nothing half done.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from redis.exceptions import RedisError

from gateway.jobs.decisions import read_decisions
from gateway.jobs.input import chosen_rows
from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobState
from services.common.contract.messages import PromptQueued, SamplingPlan
from services.common.queue import Queue
from sipo.errors import Conflict
from sipo.preferences import Example, sampling_weights, uniform_weights

log = structlog.get_logger(__name__)


Prompts = list[tuple[int, Example]]
"""What a round is made of: row of the job's input, example."""


@dataclass
class Round:
    """A round of a job, and how far it is fed."""

    job: Job
    plan: SamplingPlan
    prompts: Prompts
    position: int

    def next(self) -> PromptQueued | None:
        if self.position >= len(self.prompts):
            return None
        row, example = self.prompts[self.position]
        return PromptQueued(job=self.job.id, round=self.job.round, prompt=str(row), example=example, plan=self.plan)


def sampling_plan(job: Job) -> SamplingPlan:
    """Eq. 3-5 with the job's pinned sets; W and w_e as given, or their defaults."""
    spec = job.spec
    assert job.sampling_set and job.reward_set and spec.objectives, "a generating job has its sets and objectives"
    return SamplingPlan(
        sampling_set=job.sampling_set,
        reward_set=job.reward_set,
        weights=spec.weights or sampling_weights(spec.objectives),
        review_weights=spec.review_weights or uniform_weights(spec.objectives),
        mode=spec.mode,
        refine=spec.refine,
        samples_per_weight=spec.samples_per_weight,
        teachers=spec.teachers,
        temperature=spec.temperature,
        seed=spec.seed,
        max_tokens=spec.max_tokens,
        review_max_tokens=spec.review_max_tokens,
        filter=spec.filter,
    )


class Feeder:
    def __init__(self, queue: Queue, jobs: JobStore, folder: Path, pause: float = 0.5) -> None:
        """`folder` holds a folder per job with its input; `pause` is in seconds."""
        self.queue = queue
        self.jobs = jobs
        self.folder = folder
        self.pause = pause
        self._prompts: dict[tuple[str, int], Prompts] = {}  # by job and round, of the jobs that are generating

    async def run(self) -> None:
        """Runs until cancelled, and through outages of the queue server."""
        while True:
            try:
                await self.top_up()
            except RedisError as error:
                log.warning("the queue server does not answer", error=repr(error))
            await asyncio.sleep(self.pause)

    async def top_up(self) -> None:
        """One prompt of each job in turn, until the stream is full or nothing is left."""
        rounds = [round_ for job in await self.jobs.list(JobState.GENERATING) if (round_ := await self._open(job))]
        self._prompts = {(round_.job.id, round_.job.round): round_.prompts for round_ in rounds}
        while rounds:
            for round_ in list(rounds):
                prompt = round_.next()
                fed = await self.queue.feed(prompt, round_.position) if prompt else "closed"
                if fed == "full":
                    return
                if fed == "fed":
                    round_.position += 1
                else:  # done, closed meanwhile, or another feeder is ahead: the next top-up sees the job anew
                    rounds.remove(round_)

    async def _open(self, job: Job) -> Round | None:
        prompts = self._prompts.get((job.id, job.round))
        try:
            if prompts is None:
                prompts = await asyncio.to_thread(read_prompts, JobFiles(self.folder / job.id), job)
            if job.total is None:
                await self.jobs.update(job.id, of_round=job.round, total=len(prompts))
        except (OSError, ValueError) as error:
            with suppress(Conflict):
                await self.jobs.advance(job.id, job.state, JobState.FAILED, error=f"its prompts cannot be read: {error}")
            return None
        except Conflict:  # it has ended, or its round has, since it was listed
            return None
        return Round(job, sampling_plan(job), prompts, job.counts.queued)


def read_prompts(files: JobFiles, job: Job) -> Prompts:
    """What the job's round is made of: the same for whoever reads it whenever, as the decisions of earlier rounds do not change."""
    with files.input.open() as file:
        examples = [Example.model_validate_json(line) for line in file]
    rows = chosen_rows(job.spec, examples)
    if job.round > 1 and job.spec.round_prompts == "unresolved":
        decisions = read_decisions(files.decisions)
        resolved = {int(decision.prompt) for decision in decisions if decision.round < job.round and decision.outcome == "accepted"}
        rows = [row for row in rows if row not in resolved]
    return [(row, examples[row]) for row in rows]
