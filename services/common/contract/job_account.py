"""What pages show of a job (sipo.evaluation.job_account): read from its report, and from what lies beside that in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from services.common.contract.job_files import JobFiles
from services.common.contract.messages import PromptDecided
from services.common.contract.reports import Report, RoundReport
from sipo.datasets import ConflictReport, conflict_report
from sipo.evaluation.job_account import CurvePoint, JobAccount, RoundShown, StageShown, TrainingShown, TruthShown
from sipo.evaluation.plan import shown
from sipo.evaluation.summary import Context
from sipo.preferences import Example
from sipo.training.run_folder import HISTORY, SftFolder
from sipo.training.settings import SftMetrics, TrainMetrics

INPUT = "the job’s input"


def context_of(report: Report, files: JobFiles, reward_models: Mapping[str, str]) -> Context:
    """The job's account, and how much the objectives of its input disagree. `reward_models`: this system's, address by name."""
    return Context(data={INPUT: _conflicts(files.input)}, jobs=[account_of(report, files, reward_models)])


def account_of(report: Report, files: JobFiles, reward_models: Mapping[str, str]) -> JobAccount:
    """Curves are known, and which external models filtered, where the files are there."""
    trainings = [
        _training(round_, metrics, files)
        for round_, of_round in [(0, report.alignment), *((one.round, one.training) for one in report.rounds)]
        for metrics in of_round.values()
    ]
    return JobAccount(
        job=report.job,
        policy=report.policy,
        rounds=[_round(one) for one in report.rounds],
        trainings=[*([] if report.sft is None else [_fine_tuning(report.sft, files)]), *trainings],
        policy_set=report.policy_set,
        activated=report.activated,
        reason=report.reason,
        reward_models={name: shown(reward_models.get(name, "")) for name in _external(files.decisions, report.objectives)},
    )


def _conflicts(file: Path) -> ConflictReport:
    with file.open() as lines:
        return conflict_report([Example.model_validate_json(line) for line in lines])


def _round(one: RoundReport) -> RoundShown:
    plain = RoundShown(
        round=one.round,
        prompts=one.funnel.prompts,
        failed=one.funnel.failed,
        candidates=one.funnel.candidates,
        rejected=one.funnel.rejected,
        accepted=one.funnel.accepted,
        pairs=one.funnel.pairs,
        ground_truth={
            name: TruthShown(originals=(means.response_0, means.response_1), accepted=means.accepted)
            for name, means in one.ground_truth.items()
        },
    )
    account = one.candidates
    if account is None:
        return plain
    return plain.model_copy(
        update={
            "stages": {
                name: StageShown(candidates=stage.candidates, truncated=stage.truncated, truly_better=stage.truly_better)
                for name, stage in account.stages.items()
            },
            "chosen": account.accepted.responses,
            "chosen_better": account.accepted.truly_better,
            "available": account.best_available and account.best_available.prompts,
            "order": {name: (order.right, order.comparisons) for name, order in account.implicit_order.items()},
        }
    )


def _training(round_: int, metrics: TrainMetrics, files: JobFiles) -> TrainingShown:
    return TrainingShown(
        round=round_,
        objective=metrics.objective,
        pairs=metrics.pairs,
        steps=metrics.steps,
        loss=(metrics.before.loss, metrics.after.loss),
        accuracy=(metrics.before.accuracy, metrics.after.accuracy),
        held_out=metrics.held_out,
        curve=_curve(files.training_run(round_, metrics.objective) / HISTORY),
    )


def _fine_tuning(metrics: SftMetrics, files: JobFiles) -> TrainingShown:
    return TrainingShown(
        round=0,
        objective="fine-tuning",
        pairs=metrics.rows,
        steps=metrics.steps,
        loss=(metrics.loss_before, metrics.loss_after),
        accuracy=None,
        held_out=metrics.validation_rows > 0,
        curve=_curve(SftFolder(files.fine_tuning).adapter / HISTORY),
    )


def _curve(history: Path) -> list[CurvePoint]:
    return list(_points(history)) if history.is_file() else []


def _points(history: Path) -> Iterator[CurvePoint]:
    reached = {"": -1, "eval_": -1}
    for line in history.read_text().splitlines():
        entry = json.loads(line)
        for prefix, before in reached.items():
            # A second look at the last step is one at the weights that were kept, which may be those of a step before.
            if f"{prefix}loss" in entry and entry["step"] > before:
                reached[prefix] = entry["step"]
                accuracy = entry.get(f"{prefix}rewards/accuracies")
                yield CurvePoint(step=entry["step"], loss=entry[f"{prefix}loss"], accuracy=accuracy, validation=bool(prefix))


def _external(decisions: Path, objectives: list[str]) -> list[str]:
    """The names of a filter's external reward models: those of the first scored prompt that are neither an objective nor a soup."""
    if not decisions.is_file():
        return []
    with decisions.open() as file:
        for line in file:
            rewards = PromptDecided.model_validate_json(line).rewards_0
            if rewards:
                return [name for name in rewards if name not in objectives and "=" not in name]
    return []
