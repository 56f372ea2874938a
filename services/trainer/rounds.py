"""A round of self-improvement, stage by stage: what each state of a job does.

Every stage may be interrupted at any point and begun again: what is finished on disk is found, not done twice. Which stage is next
is decided in services.trainer.lifecycle.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job
from services.common.contract.messages import PromptDecided
from services.common.contract.reports import Funnel, GroundTruth, Report, RoundReport
from services.common.local.training import run_child
from sipo.errors import Conflict
from sipo.evaluation.ground_truth import REWARDS
from sipo.files import sync, write_atomically
from sipo.policies import BaseModelRef, Draft, PolicySet, PolicyStore
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.training.data import ChosenResponse, Design, TrainingPair, alignment_pairs, pareto_rows
from sipo.training.settings import ADAPTER, METRICS, PAIRS, Progress, TrainMetrics, TrainRun, TrainSettings, write_run

ADVICE = {
    "worse_than_original": "more samples_per_weight or another temperature gives more to choose from",
    "truncated": "a larger max_tokens lets responses end",
    "duplicate": "a higher temperature gives different responses",
    "empty": "see whether the policies answer such prompts at all",
}


@dataclass(frozen=True)
class Base:
    """The base model of this service."""

    folder: Path
    ref: BaseModelRef
    prompt_format: PromptFormat


@dataclass(frozen=True)
class Stages:
    base: Base
    store: PolicyStore
    jobs_dir: Path
    command: Sequence[str] | None = None
    """What starts a training run; None: one process."""

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

    async def align(self, job: Job, tell: Callable[[Progress], Awaitable[None]]) -> PolicySet:
        """A first alignment (Eq. 2) for each objective, published without becoming current."""
        if (published := self.published(job, 0)) is not None:
            return published
        objectives = job.spec.objectives
        assert objectives, "the gateway settles the objectives of a job without policies"
        settings = job.spec.alignment.model_copy(update={"alpha": 0.0})
        with self.files(job).input.open() as file:
            examples = [Example.model_validate_json(line) for line in file]
        metrics = {}
        for objective in objectives:
            run = self._run(objective, settings, self.base.prompt_format, start=None)
            metrics[objective] = await self._train(
                self.files(job).training_run(0, objective), run, alignment_pairs(examples, objective), tell
            )
        return self._publish(job, 0, objectives, settings, metrics=metrics, parent=None)

    async def train(self, job: Job, decisions: Iterable[PromptDecided], tell: Callable[[Progress], Awaitable[None]]) -> None:
        """Eq. 8 for each objective, from the policies that the round started from, on the pairs of the responses it accepted."""
        assert job.sampling_set is not None
        start = self.store.get(job.sampling_set)
        decisions = list(decisions)
        for objective in start.objectives:
            pairs = pareto_pairs_of(decisions, objective, job.spec.preferences)
            run = self._run(objective, job.spec.training_for(objective), start.manifest.prompt_format, start.adapter_dir(objective))
            await self._train(self.files(job).training_run(job.round, objective), run, pairs, tell)

    def publish(self, job: Job) -> PolicySet:
        """The round's policies as a new version; once, however often this is called."""
        assert job.sampling_set is not None
        parent = self.store.get(job.sampling_set)
        objectives, metrics = parent.objectives, self.metrics(job, job.round, parent.objectives)
        return self.published(job, job.round) or self._publish(
            job, job.round, objectives, job.spec.training, metrics=metrics, parent=parent
        )

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
        assert job.sampling_set is not None
        return self.store.get(job.sampling_set).objectives

    def files(self, job: Job) -> JobFiles:
        return JobFiles(self.jobs_dir / job.id)

    def metrics(self, job: Job, round_: int, objectives: Iterable[str]) -> dict[str, TrainMetrics]:
        """Of the runs that are finished."""
        paths = {objective: self.files(job).training_run(round_, objective) / METRICS for objective in objectives}
        return {name: TrainMetrics.model_validate_json(path.read_text()) for name, path in paths.items() if path.exists()}

    def untrained(self, job: Job, round_: int) -> bool:
        """Whether any run of the round is not finished."""
        objectives = job.spec.objectives if round_ == 0 else self.objectives(job)
        return objectives is None or len(self.metrics(job, round_, objectives)) < len(objectives)

    def published(self, job: Job, round_: int) -> PolicySet | None:
        """The set that this job published for this round, if it did: a crash may have kept it from being told."""
        name = job.spec.policy
        return next((one for one in self.store.sets() if one.manifest.name == name and _made_by(one) == (job.id, round_)), None)

    def _run(self, objective: str, settings: TrainSettings, prompt_format: PromptFormat, start: Path | None) -> TrainRun:
        base = self.base
        return TrainRun(
            method="dpo" if start is None else "sipo",
            objective=objective,
            base=base.folder,
            base_name=base.ref.name,
            prompt_format=prompt_format,
            start=start,
            settings=settings,
        )

    async def _train(
        self, folder: Path, run: TrainRun, pairs: Iterable[TrainingPair], tell: Callable[[Progress], Awaitable[None]]
    ) -> TrainMetrics:
        if (folder / METRICS).exists():
            return TrainMetrics.model_validate_json((folder / METRICS).read_text())
        path = write_run(folder, run)
        write_atomically(folder / PAIRS, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        return await run_child(path, tell, self.command)

    def _publish(
        self,
        job: Job,
        round_: int,
        objectives: list[str],
        settings: TrainSettings,
        *,
        metrics: dict[str, TrainMetrics],
        parent: PolicySet | None,
    ) -> PolicySet:
        folders = {objective: self.files(job).training_run(round_, objective) for objective in objectives}
        spec, data = job.spec, hashlib.sha256()
        how = {"method": "sipo", "mode": spec.mode, "preferences": spec.preferences} if parent else {"method": "dpo"}
        rates = {name: (spec.training_for(name) if parent else settings).learning_rate for name in objectives}
        for folder in folders.values():
            data.update((folder / PAIRS).read_bytes())
        draft = Draft(
            name=spec.policy,
            base=self.base.ref,
            prompt_format=parent.manifest.prompt_format if parent else self.base.prompt_format,
            objectives=objectives,
            beta=settings.beta,
            round=parent.manifest.round + 1 if parent else 0,
            parent=parent and parent.id,
            data_sha256=data.hexdigest(),
            settings=settings.model_dump(exclude={"learning_rate"})
            | how
            | {"learning_rates": rates, "job": job.id, "job_round": round_},
            metrics={objective: one.model_dump() for objective, one in metrics.items()},
        )
        return self.store.publish(draft, {name: folder / ADAPTER for name, folder in folders.items()}, self.base.folder)


def pareto_pairs_of(
    decisions: Iterable[PromptDecided], objective: str | None = None, design: Design = "both"
) -> list[TrainingPair]:
    """D^c: the pairs of every chosen response; with `objective` those that its policy learns, by the design."""
    return [
        row
        for decision in decisions
        for row in pareto_rows(
            decision.example,
            [ChosenResponse(one.text, one.token_ids, only) for one, only in decision.accepted()],
            objective,
            design,
        )
    ]


def funnel(decisions: Sequence[PromptDecided]) -> Funnel:
    candidates = [candidate for decision in decisions for candidate in decision.candidates]
    rules = Counter(candidate.rejected.partition(":")[0] for candidate in candidates if candidate.rejected)
    return Funnel(
        prompts=len(decisions),
        failed=sum(decision.outcome == "failed" for decision in decisions),
        candidates=len(candidates),
        rejected=dict(rules.most_common()),
        accepted=sum(decision.outcome == "accepted" for decision in decisions),
        pairs=len(pareto_pairs_of(decisions)),
    )


def why_not_trainable(decisions: Sequence[PromptDecided], objectives: Iterable[str], design: Design = "both") -> str | None:
    """None if every objective has pairs, otherwise one sentence from the filter's figures, and what might help."""
    without = [objective for objective in objectives if not pareto_pairs_of(decisions, objective, design)]
    if not without:
        return None
    for objective in without:
        accepted = sum(any(only in (None, objective) for _, only in decision.accepted()) for decision in decisions)
        if accepted:
            return (
                f"no pair for {objective} with preferences: {design}, as none of the prompts with an accepted response "
                f"({accepted}) has a label for it"
            )
    figures = funnel(decisions)
    failed = next((decision.error for decision in decisions if decision.outcome == "failed"), None)
    if figures.failed == figures.prompts:
        return f"every one of {figures.prompts} prompts failed, the first with: {failed}"
    rules = ", ".join(f"{count} {rule}" for rule, count in figures.rejected.items()) or "none"
    reason = (
        f"no response passed the filter for {', '.join(without)}, in {figures.prompts} prompts with {figures.candidates} "
        f"candidates (rejected: {rules}; prompts failed: {figures.failed})"
    )
    advice = ADVICE.get(next(iter(figures.rejected), ""))
    return f"{reason}: {advice}" if advice else reason


def ground_truth(objectives: Sequence[str], decisions: Iterable[PromptDecided]) -> dict[str, GroundTruth]:
    """For the objectives with a known function: the mean rewards of the accepted prompts' originals and of their new responses."""
    means = {}
    for objective, reward in REWARDS.items():
        accepted = [
            (decision.example, candidate.text)
            for decision in decisions
            for candidate, only in decision.accepted()
            if only in (None, objective)
        ]
        if accepted and objective in objectives:
            means[objective] = GroundTruth(
                response_0=fmean(reward(example.prompt, example.response_0) for example, _ in accepted),
                response_1=fmean(reward(example.prompt, example.response_1) for example, _ in accepted),
                accepted=fmean(reward(example.prompt, text) for example, text in accepted),
            )
    return means


def _made_by(policy_set: PolicySet) -> tuple[Any, Any]:
    settings = policy_set.manifest.settings
    return settings.get("job"), settings.get("job_round")
