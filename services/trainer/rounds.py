"""A round of self-improvement, stage by stage: what each state of a job does.

Every stage may be interrupted at any point and begun again: what is finished on disk is found, not done twice. Which stage is next
is decided in services.trainer.lifecycle.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job
from services.common.contract.messages import PromptDecided
from services.common.contract.reports import Report, RoundReport
from services.common.local.training import Tell, run_child
from services.trainer.account import candidates_account
from services.trainer.pairs import pareto_pairs_of
from services.trainer.reporting import funnel, ground_truth
from sipo.errors import Conflict
from sipo.files import sync, write_atomically
from sipo.models import Base
from sipo.policies import JobRound, PolicySet, PolicyStore
from sipo.preferences import Example
from sipo.resources import check, needed_by_training
from sipo.training.planning import PlannedRun, Planner
from sipo.training.run_folder import RunFolder
from sipo.training.run_set import publish_runs
from sipo.training.settings import TrainMetrics

RunTraining = Callable[[Path, Tell], Awaitable[TrainMetrics]]
"""Trains what a run.yaml says, and tells how far it is."""


@dataclass(frozen=True)
class Stages:
    base: Base
    store: PolicyStore
    jobs_dir: Path
    run_training: RunTraining = run_child

    def starting_sets(self, job: Job) -> tuple[PolicySet, PolicySet] | None:
        """(sampling set, reward set) for a job that starts from policies; None if it has to align them first."""
        aligned = self.published(job, 0)
        if aligned is None and job.spec.policy not in self.store.names():
            return None
        sampling = aligned or self.store.get(job.spec.sampling_set or job.spec.policy)
        sampling.check_base(self.base.ref.sha256)
        if set(job.spec.objectives or sampling.objectives) != set(sampling.objectives):
            raise Conflict(f"{sampling.id} has policies for {', '.join(sampling.objectives)}, the job is for other objectives")
        reward = sampling
        while job.spec.reward_set == "first" and reward.manifest.round > 0 and reward.manifest.parent is not None:
            reward = self.store.get(reward.manifest.parent)
        return sampling, reward

    async def align(self, job: Job, tell: Tell) -> PolicySet:
        """A first alignment (Eq. 2) for each objective, published without becoming current."""
        if (published := self.published(job, 0)) is not None:
            return published
        objectives = job.spec.objectives
        assert objectives, "the gateway settles the objectives of a job without policies"
        settings = job.spec.alignment.model_copy(update={"alpha": 0.0})
        with self.files(job).input.open() as file:
            examples = [Example.model_validate_json(line) for line in file]
        check(needed_by_training(self.base.folder, settings, len(objectives)), self.jobs_dir)
        planner = Planner(self.base)
        for objective in objectives:
            await self._train(job, 0, planner.dpo(objective, examples, settings), tell)
        return self._publish(job, 0, objectives, parent=None)

    async def train(self, job: Job, decisions: Iterable[PromptDecided], tell: Tell) -> None:
        """Eq. 8 for each objective, from the policies that the round started from, on the pairs of the responses it accepted."""
        start, decisions = self._sampling_set(job), list(decisions)
        check(needed_by_training(self.base.folder, job.spec.training, len(start.objectives)), self.jobs_dir)
        planner = Planner(self.base, start)
        for objective in start.objectives:
            pairs = pareto_pairs_of(decisions, objective, job.spec.preferences)
            await self._train(job, job.round, planner.sipo(objective, pairs, job.spec.training_for(objective)), tell)

    def publish(self, job: Job) -> PolicySet:
        """The round's policies as a new version; once, however often this is called."""
        parent = self._sampling_set(job)
        how = {"mode": job.spec.mode, "preferences": job.spec.preferences}
        return self._publish(job, job.round, parent.objectives, parent=parent, **how)

    def report(self, job: Job, decisions: Sequence[PromptDecided], *, activated: bool = False, reason: str | None = None) -> Report:
        """What the rounds came to so far, also as a file; `decisions` are those of the job's present round.

        What it says of the rounds before is taken over from that file, which is on disk before a job goes on to its next round.
        """
        assert job.sampling_set is not None and job.reward_set is not None
        objectives, path = self.objectives(job), self.files(job).report
        before = Report.model_validate_json(path.read_text()).rounds[: job.round - 1] if job.round > 1 else []
        published = self.published(job, job.round)
        this = RoundReport(
            round=job.round,
            sampling_set=job.sampling_set,
            reward_set=job.reward_set,
            funnel=funnel(decisions),
            ground_truth=ground_truth(objectives, decisions),
            candidates=candidates_account(objectives, decisions),
            training=self.metrics(job, job.round, objectives),
            policy_set=published and published.id,
        )
        report = Report(
            job=job.id,
            policy=job.spec.policy,
            objectives=objectives,
            alignment=self.metrics(job, 0, objectives),
            rounds=[*before, this],
            policy_set=this.policy_set or job.policy_set,
            activated=activated,
            reason=reason,
        )
        write_atomically(path, report.model_dump_json(indent=1))
        sync(path.parent)
        return report

    def objectives(self, job: Job) -> list[str]:
        return self._sampling_set(job).objectives

    def files(self, job: Job) -> JobFiles:
        return JobFiles(self.jobs_dir / job.id)

    def metrics(self, job: Job, round_: int, objectives: Iterable[str]) -> dict[str, TrainMetrics]:
        """Of the runs that are finished."""
        finished = {objective: self._run_folder(job, round_, objective).finished() for objective in objectives}
        return {objective: metrics for objective, metrics in finished.items() if metrics is not None}

    def untrained(self, job: Job, round_: int) -> bool:
        """Whether any run of the round is not finished."""
        objectives = job.spec.objectives if round_ == 0 else self.objectives(job)
        return objectives is None or len(self.metrics(job, round_, objectives)) < len(objectives)

    def published(self, job: Job, round_: int) -> PolicySet | None:
        """The set that this job published for this round, if it did."""
        return self.store.published_by(job.spec.policy, JobRound(job=job.id, round=round_))

    def _sampling_set(self, job: Job) -> PolicySet:
        assert job.sampling_set is not None
        return self.store.get(job.sampling_set)

    def _run_folder(self, job: Job, round_: int, objective: str) -> RunFolder:
        return RunFolder(self.files(job).training_run(round_, objective))

    async def _train(self, job: Job, round_: int, planned: PlannedRun, tell: Tell) -> None:
        folder = self._run_folder(job, round_, planned.name)
        if folder.finished() is None:
            folder.prepare(planned.run, planned.pairs)
            await self.run_training(folder.run_file, tell)

    def _publish(self, job: Job, round_: int, objectives: Iterable[str], *, parent: PolicySet | None, **how: Any) -> PolicySet:
        runs = {objective: self._run_folder(job, round_, objective) for objective in objectives}
        made_by = JobRound(job=job.id, round=round_)
        return publish_runs(self.store, job.spec.policy, runs, base=self.base, parent=parent, made_by=made_by, **how)
