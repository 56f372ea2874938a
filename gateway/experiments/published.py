"""What stays of an experiment for people: small results of its finished steps, beside its file, in results/NAME.

summary.json                          a Summary
seed-1/STAGE/OBJECTIVE/metrics.json   of a training, with its curve, loss.png
seed-1/STAGE/report.json              of a round: funnel, and what the candidates were worth
all-seeds/STAGE/report.json           of an evaluation, without answers, with its picture front.png
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from gateway.experiments.plan import Plan, Step
from gateway.experiments.result import Result
from services.common.contract.reports import Report
from sipo.evaluation.folder import REPORT
from sipo.evaluation.report import Comparison, EvaluationReport, Interval, Verdict, family, seed_of
from sipo.files import write_atomically
from sipo.record import Record
from sipo.training.run_folder import ADAPTER, CURVE, METRICS, RECIPE

RESULTS = "results"
FRONT, RUNS, DATA, JOB_REPORT = "front", "runs", "data", "report.json"
"""In a step's folder: its evaluation, its training runs, what a system has as its data folder, and its job's report."""
SUMMARY = "summary.json"


class Hypervolume(Record):
    method: str
    seed: str | None
    hypervolume: Interval


class EvaluationSummary(Record):
    """`verdicts` are over seeds; p values are corrected by Holm's method over all comparisons of the evaluation."""

    hypervolumes: list[Hypervolume]
    comparisons: list[Comparison]
    verdicts: list[Verdict]


class Summary(Record):
    experiment: str
    description: str
    evaluations: dict[str, EvaluationSummary]
    steps: list[Result]


def publish_results(plan: Plan) -> Path:
    """What there is so far takes the place of what was there before. Returns the folder."""
    folder = plan.file.path.parent / RESULTS / plan.experiment.name
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    finished = [(step, result) for step in plan.steps if (result := step.result()) is not None]
    for step, _ in finished:
        _copy_step(step, aside / step.folder.parent.name / step.stage.name)
    evaluations = {step.stage.name: _summarised(step) for step, _ in finished if step.stage.kind == "evaluate"}
    summary = Summary(
        experiment=plan.experiment.name,
        description=plan.experiment.description,
        evaluations=evaluations,
        steps=[result for _, result in finished],
    )
    write_atomically(aside / SUMMARY, summary.model_dump_json(indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def _copy_step(step: Step, to: Path) -> None:
    for metrics, name in _metrics(step.folder):
        run = to / name
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(metrics, run)
        if (curve := next(metrics.parent.rglob(CURVE), None)) is not None:
            shutil.copy(curve, run)
    if (report := step.folder / JOB_REPORT).is_file():
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(report, to)
    if step.stage.kind == "evaluate":
        to.mkdir(parents=True, exist_ok=True)
        without_answers = _report(step).model_copy(update={"samples": []})
        write_atomically(to / REPORT, without_answers.model_dump_json(indent=1) + "\n")
        shutil.copy(step.folder / FRONT / "front.png", to)


def _metrics(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Of the step's own trainings, of its job's, and of a fine-tuning, each with the folder that it is copied to."""
    homes = [folder / RUNS]
    if (report := folder / JOB_REPORT).is_file():
        homes.append(folder / DATA / "jobs" / Report.model_validate_json(report.read_bytes()).job)
    for home in homes:
        for path in sorted(home.glob(f"**/{METRICS}")):
            yield path, path.parent.relative_to(home)
    if (recipe := folder / ADAPTER / RECIPE).is_file():
        yield recipe, Path()


def _report(step: Step) -> EvaluationReport:
    return EvaluationReport.model_validate(json.loads((step.folder / FRONT / REPORT).read_bytes()))


def _summarised(step: Step) -> EvaluationSummary:
    report = _report(step)
    return EvaluationSummary(
        hypervolumes=[
            Hypervolume(method=family(method.name), seed=seed_of(method.name), hypervolume=method.hypervolume)
            for method in report.methods
        ],
        comparisons=[comparison.model_copy(update={"improvements": []}) for comparison in report.comparisons],
        verdicts=report.verdicts,
    )
