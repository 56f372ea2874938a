"""A round of self-improvement, stage by stage: what each state of a job does.

Every stage may be interrupted at any point and begun again: what is finished on disk is found, not done twice. Which stage is next
is decided in services.trainer.lifecycle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from services.common.contract.evaluations import FUNCTION, EvaluationSpec
from services.common.contract.job_account import context_of
from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job
from services.common.contract.messages import PromptDecided
from services.common.contract.reports import Report, RoundEvaluation, RoundReport
from services.common.local.training import Tell, run_child
from services.trainer.account import candidates_account
from services.trainer.evaluator import Evaluator
from services.trainer.evaluator import Tell as TellEvaluation
from services.trainer.pairs import pareto_pairs_of
from services.trainer.reporting import figures, funnel, ground_truth
from sipo.datasets import answers_of
from sipo.errors import Conflict, SipoError
from sipo.evaluation.task import TaskFolder
from sipo.files import sync, write_atomically
from sipo.models import Base
from sipo.policies import JobRound, PolicySet, PolicyStore
from sipo.preferences import Example
from sipo.resources import check, needed_by_sft, needed_by_training
from sipo.training.planning import PlannedRun, Planner, fine_tuning
from sipo.training.run_folder import RunFolder, SftFolder
from sipo.training.run_set import publish_runs
from sipo.training.settings import TrainMetrics, TrainSettings

log = structlog.get_logger(__name__)

RunTraining = Callable[[Path, Tell], Awaitable[object]]
"""Trains what a run.yaml says, and tells how far it is."""


@dataclass(frozen=True)
class Stages:
    base: Base
    store: PolicyStore
    jobs_dir: Path
    run_training: RunTraining = run_child
    evaluator: Evaluator = field(kw_only=True)

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
        """A first alignment (Eq. 2) for each objective, after a fine-tuning if the job asks for one; published without becoming
        current."""
        if (published := self.published(job, 0)) is not None:
            return published
        objectives = job.spec.objectives
        assert objectives, "the gateway settles the objectives of a job without policies"
        settings = job.spec.alignment.model_copy(update={"alpha": 0.0})
        examples = await asyncio.to_thread(self._examples, job)
        check(needed_by_training(self.base.folder, settings, len(objectives)), self.jobs_dir)
        reference = None if job.spec.sft is None else await self._fine_tune(job, job.spec.sft, examples, tell)

        def plan() -> list[PlannedRun]:
            planner = Planner(self.base, reference=reference)
            return [planner.dpo(objective, examples, settings) for objective in objectives]

        await self._train_all(job, 0, plan, tell)
        return await asyncio.to_thread(self._publish, job, 0, objectives, parent=None)

    async def train(self, job: Job, decisions: Iterable[PromptDecided], tell: Tell) -> None:
        """Eq. 8 for each objective, from the policies that the round started from, on the pairs of the responses it accepted."""
        start, decisions = self._sampling_set(job), list(decisions)
        check(needed_by_training(self.base.folder, job.spec.training, len(start.objectives)), self.jobs_dir)

        def plan() -> list[PlannedRun]:
            planner = Planner(self.base, start)
            pairs = {objective: pareto_pairs_of(decisions, objective, job.spec.preferences) for objective in start.objectives}
            return [planner.sipo(objective, of, job.spec.training_for(objective)) for objective, of in pairs.items()]

        await self._train_all(job, job.round, plan, tell)

    def unevaluated(self, job: Job) -> bool:
        """Whether the job asks for an evaluation of its round that has not ended yet."""
        return job.spec.evaluation is not None and not self.files(job).evaluation_outcome(job.round).exists()

    async def evaluate(self, job: Job, report: Report, tell: TellEvaluation) -> None:
        """The set that the round samples from, and the policies that it trained, on the prompts that were held out; `report` is
        shown beside. What is found is kept, and so is why nothing is: that is no reason to lose the round."""
        asked, files = job.spec.evaluation, self.files(job)
        assert asked is not None and job.sampling_set is not None
        folder = TaskFolder(files.evaluation(job.round))
        # Rewards of other judges than functions are counted from the base's.
        base = [] if all(judge.startswith(FUNCTION) for judge in asked.judges.values()) else ["base"]
        sources = {"before": job.sampling_set, "after": str(files.training_runs(job.round))}
        methods = [*base, *(f"{name}={job.spec.mode}:{source}" for name, source in sources.items())]
        spec = EvaluationSpec(**asked.model_dump(), methods=methods, against=["before"])
        folder.path.mkdir(exist_ok=True)
        write_atomically(folder.prompts_file, files.held_out.read_text(encoding="utf-8"))
        name = f"{job.spec.policy}, round {job.round} of {job.id}"
        context = await asyncio.to_thread(context_of, report, files, self.evaluator.settings.reward_models)
        try:
            found = figures(await self.evaluator.run(folder, spec, name, tell, context))
        except Conflict:  # of what is told: the job has ended, or is another trainer's
            raise
        except (SipoError, OSError) as error:
            found = RoundEvaluation(prompts=len(folder.prompts()), error=str(error))
        write_atomically(files.evaluation_outcome(job.round), found.model_dump_json(indent=1))

    def publish(self, job: Job) -> PolicySet:
        """The round's policies as a new version; once, however often this is called."""
        parent = self._sampling_set(job)
        how = {"mode": job.spec.mode, "preferences": job.spec.preferences}
        return self._publish(job, job.round, parent.objectives, parent=parent, **how)

    def report(self, job: Job, decisions: Sequence[PromptDecided], *, activated: bool = False, reason: str | None = None) -> Report:
        """What the rounds came to so far, also as files; `decisions` are those of the job's present round.

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
            evaluation=self._evaluation(job),
            policy_set=published and published.id,
        )
        report = Report(
            job=job.id,
            policy=job.spec.policy,
            objectives=objectives,
            sft=self._sft_folder(job).finished(),
            alignment=self.metrics(job, 0, objectives),
            rounds=[*before, this],
            policy_set=this.policy_set or job.policy_set,
            activated=activated,
            reason=reason,
        )
        write_atomically(path, report.model_dump_json(indent=1))
        from services.trainer.page import write_report_page  # with matplotlib, which takes a second to import

        try:
            write_report_page(report, self.files(job), self.evaluator.settings.reward_models)
        except Exception:  # whatever is wrong with a page, the report has all that counts
            log.exception("the job's page could not be made")
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

    def _evaluation(self, job: Job) -> RoundEvaluation | None:
        """Of the round, as far as it has one."""
        path = self.files(job).evaluation_outcome(job.round)
        return RoundEvaluation.model_validate_json(path.read_bytes()) if path.exists() else None

    def _run_folder(self, job: Job, round_: int, objective: str) -> RunFolder:
        return RunFolder(self.files(job).training_run(round_, objective))

    def _sft_folder(self, job: Job) -> SftFolder:
        return SftFolder(self.files(job).fine_tuning)

    async def _fine_tune(self, job: Job, settings: TrainSettings, examples: Iterable[Example], tell: Tell) -> Path:
        """The adapter that a fine-tuning on all responses leaves."""
        folder, base = self._sft_folder(job), self.base
        if folder.finished() is None:
            check(needed_by_sft(base.folder, settings), self.jobs_dir)
            await asyncio.to_thread(folder.prepare, fine_tuning(base, settings), map(answers_of, examples))
            await self.run_training(folder.run_file, tell)
        return folder.adapter

    def _examples(self, job: Job) -> list[Example]:
        with self.files(job).input.open() as file:
            return [Example.model_validate_json(line) for line in file]

    async def _train_all(self, job: Job, round_: int, plan: Callable[[], list[PlannedRun]], tell: Tell) -> None:
        # Planning imports torch and transformers, loads a tokenizer and hashes adapters: in a thread, as the lease is lost if the
        # event loop stands still.
        for planned in await asyncio.to_thread(plan):
            folder = self._run_folder(job, round_, planned.name)
            if folder.finished() is None:
                await asyncio.to_thread(folder.prepare, planned.run, planned.pairs)
                await self.run_training(folder.run_file, tell)

    def _publish(self, job: Job, round_: int, objectives: Iterable[str], *, parent: PolicySet | None, **how: Any) -> PolicySet:
        runs = {objective: self._run_folder(job, round_, objective) for objective in objectives}
        made_by = JobRound(job=job.id, round=round_)
        return publish_runs(self.store, job.spec.policy, runs, base=self.base, parent=parent, made_by=made_by, **how)
