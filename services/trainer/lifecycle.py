"""Moves jobs through their states: one task follows one job, trainings take turns, decisions are kept meanwhile.

All that must survive a crash is in Redis (states) and on disk (decisions, finished runs, policy sets): a task that follows a job
begins with the state it finds. Changes are made under the trainer's lease, so a second trainer waits instead of doing the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
from redis.exceptions import RedisError

from services.common.background import end_tasks
from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobState
from services.common.contract.messages import PromptDecided
from services.common.contract.records import Lease
from services.common.queue import Delivery
from services.common.web.clients import DecoderClient
from services.trainer.decisions import DecisionLog
from services.trainer.decoders import asleep
from services.trainer.reporting import why_not_trainable
from services.trainer.rounds import Stages
from sipo.errors import Conflict, NotFound, SipoError, Unavailable
from sipo.record import Record

log = structlog.get_logger(__name__)

JOBS_POLL_SECONDS = 0.5
"""Seconds between looks at the jobs."""


class Lifecycle:
    """`decoders`: those that sleep while policies are trained."""

    def __init__(self, stages: Stages, jobs: JobStore, lease: Lease, decoders: Sequence[DecoderClient] = ()) -> None:
        self.stages = stages
        self.jobs = jobs
        self.lease = lease
        self.decoders = decoders
        self._logs: dict[str, DecisionLog] = {}
        self._log_lock = asyncio.Lock()
        self._training = asyncio.Lock()

    async def run(self) -> None:
        """Follows every open job until cancelled; ends when the lease is lost."""
        following: dict[str, asyncio.Task[None]] = {}
        try:
            while not self.lease.lost.is_set():
                try:
                    jobs = await self.jobs.list()
                except RedisError as error:
                    log.warning("the queue server does not answer", error=str(error))
                    jobs = []
                else:
                    for deleted in following.keys() - {job.id for job in jobs}:
                        await end_tasks(following.pop(deleted))
                        self._logs.pop(deleted, None)
                for job in reversed(jobs):  # the oldest first
                    task = following.get(job.id)
                    if task is not None and (task.done() or job.state == JobState.CANCELLED):
                        await end_tasks(task)
                        del following[job.id]
                    if job.id not in following and not job.state.ended:
                        following[job.id] = asyncio.create_task(self._follow_safely(job))
                await asyncio.sleep(JOBS_POLL_SECONDS)
        finally:
            await end_tasks(*following.values())

    async def keep(self, batch: list[Delivery[PromptDecided]]) -> None:
        """Handles deliveries of sipo:decisions: on disk first, then counted, then acknowledged."""
        by_job: dict[str, list[Delivery[PromptDecided]]] = {}
        for delivery in batch:
            by_job.setdefault(delivery.message.job, []).append(delivery)
        for job, deliveries in by_job.items():
            try:
                await self._append(job, [delivery.message for delivery in deliveries])
            except SipoError as error:
                for delivery in deliveries:
                    await delivery.fail(error)
                continue
            for delivery in deliveries:
                await delivery.done()

    async def follow(self, job: Job) -> None:
        """One job, from whatever state it is in to its end."""
        if job.state == JobState.QUEUED:
            job = await self._start(job)
        if job.state == JobState.ALIGNING:
            async with self._training_turn(job, 0):
                aligned = await self.stages.align(job, self._teller(job))
            job = await self._advance(job, JobState.GENERATING, sampling_set=aligned.id, reward_set=aligned.id, progress={})
        while not job.state.ended:
            job = await self._round(job)

    async def _round(self, job: Job) -> Job:
        """A round, from whatever state it is in: after it the job is generating for the next one, or has ended."""
        if job.state == JobState.GENERATING:
            job = await self._until_decided(job)
        if job.state == JobState.TRAINING:
            async with self._training_turn(job, job.round):
                await self.stages.train(job, await self._decisions(job), self._teller(job))
            job = await self._advance(job, JobState.EVALUATING, progress={})
        if job.state == JobState.EVALUATING:
            report = await asyncio.to_thread(self.stages.report, job, await self._decisions(job))
            if self.stages.unevaluated(job):
                async with self.turn():
                    await self.stages.evaluate(job, report, self._teller(job))
                await asyncio.to_thread(self.stages.report, job, await self._decisions(job))
            job = await self._advance(job, JobState.PUBLISHING, progress={})
        if job.state == JobState.PUBLISHING:
            published = await asyncio.to_thread(self.stages.publish, job)
            job = await self._next(job, published.id)
        return job

    async def _next(self, job: Job, published: str) -> Job:
        """From publishing to the next round, or to the end if that was the last one or has left nothing to do."""
        spec, decisions = job.spec, await self._decisions(job)
        if job.round == spec.rounds:
            return await self._complete(job, decisions, published)
        if spec.round_prompts == "unresolved" and all(decision.outcome == "accepted" for decision in decisions):
            reason = f"round {job.round} of {spec.rounds} left no prompt without an accepted response"
            return await self._complete(job, decisions, published, reason)
        await asyncio.to_thread(self.stages.report, job, decisions)
        return await self._advance(
            job,
            JobState.GENERATING,
            round=job.round + 1,
            total=None,
            sampling_set=published,
            reward_set=published if spec.reward_set == "latest" else job.reward_set,
            policy_set=published,
            progress={},
            artifacts=self.stages.files(job).artifacts(),
        )

    async def _complete(
        self, job: Job, decisions: Sequence[PromptDecided], policy_set: str | None, reason: str | None = None
    ) -> Job:
        """The end, at which the newest set becomes current if the job says so; `reason`: why it comes before the last round."""
        activated = policy_set if job.spec.activate else None
        if activated is not None:
            await asyncio.to_thread(self.stages.store.activate, activated)
        await asyncio.to_thread(self.stages.report, job, decisions, activated=activated is not None, reason=reason)
        artifacts = self.stages.files(job).artifacts()
        return await self._advance(job, JobState.COMPLETED, policy_set=policy_set, reason=reason, artifacts=artifacts)

    async def _start(self, job: Job) -> Job:
        sets = await asyncio.to_thread(self.stages.starting_sets, job)
        if sets is None:
            return await self._advance(job, JobState.ALIGNING)
        sampling, reward = sets
        return await self._advance(job, JobState.GENERATING, sampling_set=sampling.id, reward_set=reward.id)

    async def _until_decided(self, job: Job) -> Job:
        """Waits until every prompt of the round is decided, then leaves `generating` one way or another."""
        while True:
            job = await self.jobs.get(job.id)
            if job.state != JobState.GENERATING:
                return job
            async with self._log_lock:
                decided = (await self._log(job.id)).decided(job.round)
            if job.total is not None and decided >= job.total:
                break
            await asyncio.sleep(JOBS_POLL_SECONDS)
        decisions = await self._decisions(job)
        if job.spec.stop_after == "pairs" and any(decision.outcome == "accepted" for decision in decisions):
            return await self._complete(job, decisions, None)
        reason = why_not_trainable(decisions, self.stages.objectives(job), job.spec.preferences)
        if reason and job.round > 1:  # what the rounds before published is worth keeping
            reason = f"round {job.round} of {job.spec.rounds} gave nothing to train on: {reason}"
            return await self._complete(job, decisions, job.policy_set, reason)
        await asyncio.to_thread(self.stages.report, job, decisions, reason=reason)
        if reason:
            return await self._advance(job, JobState.FAILED, error=reason, artifacts=self.stages.files(job).artifacts())
        return await self._advance(job, JobState.TRAINING)

    async def _follow_safely(self, job: Job) -> None:
        with structlog.contextvars.bound_contextvars(job=job.id):
            try:
                try:
                    await self.follow(job)
                except RedisError:
                    raise
                except Exception as error:
                    await self._failed(job, error)
            except RedisError as error:  # the next look at the jobs begins again with the state that stands
                log.warning("interrupted", error=str(error))

    async def _failed(self, job: Job, error: Exception) -> None:
        try:
            current = await self.jobs.get(job.id)
        except NotFound:
            log.info("deleted meanwhile", reason=str(error))
            return
        if current.state.ended or self.lease.lost.is_set():
            log.info("ended from outside", reason=str(error))
            return
        log.error("the job failed", exc_info=error)
        reason = error.message if isinstance(error, SipoError) else f"{type(error).__name__}: {error}"
        with suppress(Conflict):  # cancelled in this very moment
            await self._advance(current, JobState.FAILED, error=reason)

    async def _advance(self, job: Job, to: JobState, **fields: Any) -> Job:
        moved = await self.jobs.advance(job.id, job.state, to, lease=self.lease, **fields)
        log.info("job", job=job.id, state=str(to), error=moved.error)
        return moved

    @asynccontextmanager
    async def _training_turn(self, job: Job, round_: int) -> AsyncIterator[None]:
        """The decoders do not sleep if all its runs had ended before a crash."""
        async with self.turn(decoders_sleep=self.stages.untrained(job, round_)):
            yield

    @asynccontextmanager
    async def turn(self, *, decoders_sleep: bool = True) -> AsyncIterator[None]:
        """One training or evaluation at a time, while the decoders sleep."""
        async with self._training, asleep(self.decoders if decoders_sleep else (), self.lease.lost):
            yield

    def _teller(self, job: Job) -> Callable[[Record], Awaitable[None]]:
        async def tell(progress: Record) -> None:
            # Progress that cannot be told is lost, and no reason to end the work. A Conflict is one: the job has ended.
            with suppress(RedisError):
                await self.jobs.update(job.id, lease=self.lease, progress=progress.model_dump())

        return tell

    async def _append(self, job: str, decisions: Sequence[PromptDecided]) -> None:
        async with self._log_lock:
            if self.lease.lost.is_set():
                raise Unavailable("the trainer's lease is another's now")
            try:
                decision_log, known = await self._log(job), await self.jobs.get(job)
                # Every prompt of a closed round is decided; one decided again, after its failure, comes too late to be trained on.
                still_open = [decision for decision in decisions if not _closed(known, decision.round)]
                await asyncio.to_thread(decision_log.append, still_open)
                for round_ in {decision.round for decision in decisions}:
                    await self.jobs.set_counts(job, round_, decision_log.counts(round_))
            except OSError as error:  # no message's fault; what is on disk now is read again
                self._logs.pop(job, None)
                raise Unavailable(f"the decisions of {job} cannot be written: {error}") from error
            except RedisError as error:
                raise Unavailable(f"the queue server does not answer: {error}") from error

    async def _decisions(self, job: Job) -> list[PromptDecided]:
        async with self._log_lock:
            return await asyncio.to_thread((await self._log(job.id)).read, job.round)

    async def _log(self, job: str) -> DecisionLog:
        if job not in self._logs:
            self._logs[job] = await asyncio.to_thread(DecisionLog, self.stages.jobs_dir / job)
        return self._logs[job]


def _closed(job: Job, round_: int) -> bool:
    return round_ < job.round or job.state not in (JobState.QUEUED, JobState.ALIGNING, JobState.GENERATING)
