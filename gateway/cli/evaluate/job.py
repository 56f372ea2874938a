"""What an evaluation's report shows of a job: read from the job's report, and from what lies beside that in the job's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from services.common.contract.job_files import JobFiles
from services.common.contract.messages import PromptDecided
from services.common.contract.reports import Report, RoundReport
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.job_account import CurvePoint, JobAccount, RoundShown, StageShown, TrainingShown
from sipo.training.run_folder import HISTORY
from sipo.training.settings import TrainMetrics
from sipo.validation import explain


def read_job(path: Path, reward_models: Mapping[str, str]) -> JobAccount:
    """`path`: a job's report.json, or its folder. Curves are known, and which external models filtered, if the report lies in
    the job's folder; `reward_models` are this system's, by name. Raises NotFound and InvalidRequest."""
    file = JobFiles(path).report if path.is_dir() else path
    if not file.is_file():
        raise NotFound(f"there is no report {file}", param="job")
    try:
        report = Report.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise InvalidRequest(f"{file} is no report of a job: {explain(error)[1]}", param="job") from error
    files = JobFiles(file.parent)
    filters = _external(files.decisions, report.objectives)
    return JobAccount(
        job=report.job,
        policy=report.policy,
        rounds=[_round(one) for one in report.rounds],
        trainings=[
            _training(round_, metrics, files)
            for round_, of_round in [(0, report.alignment), *((one.round, one.training) for one in report.rounds)]
            for metrics in of_round.values()
        ],
        reward_models={name: reward_models.get(name, "") for name in filters},
    )


def _round(one: RoundReport) -> RoundShown:
    shown = RoundShown(
        round=one.round,
        prompts=one.funnel.prompts,
        failed=one.funnel.failed,
        candidates=one.funnel.candidates,
        rejected=one.funnel.rejected,
        accepted=one.funnel.accepted,
        pairs=one.funnel.pairs,
    )
    account = one.candidates
    if account is None:
        return shown
    return shown.model_copy(
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
    history = files.training_run(round_, metrics.objective) / HISTORY
    return TrainingShown(
        round=round_,
        objective=metrics.objective,
        pairs=metrics.pairs,
        steps=metrics.steps,
        loss=(metrics.before.loss, metrics.after.loss),
        accuracy=(metrics.before.accuracy, metrics.after.accuracy),
        held_out=metrics.held_out,
        curve=list(_curve(history)) if history.is_file() else [],
    )


def _curve(history: Path) -> Iterator[CurvePoint]:
    for line in history.read_text().splitlines():
        entry = json.loads(line)
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in entry:
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
