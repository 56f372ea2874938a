"""What stays of an experiment, for people and for a summary of seeds that ran elsewhere: small results of its finished steps,
beside its file, in results/NAME.

summary.json                          see gateway.experiments.summary
seed-1/seed.json                      a SeedResults
seed-1/STAGE/OBJECTIVE/metrics.json   of a training, with its curve, loss.png
seed-1/STAGE/report.json              of a round: funnel, and what the candidates were worth
seed-1/STAGE/report.json              of an evaluation, without answers, with its picture as front.png and front.svg

A seed's folder stands alone: what is made once for all seeds is in each of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from gateway.experiments.plan import Plan, Step
from gateway.experiments.result import Result
from services.common.contract.reports import Report
from sipo.evaluation.folder import REPORT
from sipo.evaluation.report import EvaluationReport
from sipo.files import write_atomically
from sipo.record import Record
from sipo.training.run_folder import ADAPTER, CURVE, METRICS, RECIPE

RESULTS = "results"
FRONT, RUNS, DATA, JOB_REPORT = "front", "runs", "data", "report.json"
"""In a step's folder: its evaluation, its training runs, what a system has as its data folder, and its job's report."""
SEED_RESULTS = "seed.json"


class SeedResults(Record):
    seed: int
    key: str = Field(description="the experiment's, at that time")
    finished: bool = Field(description="whether all steps are")
    steps: list[Result]


def results_folder(plan: Plan) -> Path:
    return plan.file.path.parent / RESULTS / plan.experiment.name


def seed_folder(results: Path, seed: int) -> Path:
    return results / f"seed-{seed}"


def read_seeds(results: Path) -> list[SeedResults]:
    """Of all seeds that lie there, whichever machine and definition they are of."""
    found = [SeedResults.model_validate_json(path.read_bytes()) for path in results.glob(f"seed-*/{SEED_RESULTS}")]
    return sorted(found, key=lambda one: one.seed)


def publish_seed(plan: Plan, seed: int) -> None:
    """What there is so far of a seed takes the place of its earlier results, unless those are finished and these are not."""
    results = results_folder(plan)
    folder = seed_folder(results, seed)
    steps = plan.steps_of([seed])
    done = [(step, result) for step in steps if (result := step.result()) is not None]
    finished = len(done) == len(steps)
    if not finished and any(one.seed == seed and one.finished for one in read_seeds(results)):
        return
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for step, _ in done:
        _copy_step(step, aside / step.stage.name)
    of_seed = SeedResults(seed=seed, key=plan.key, finished=finished, steps=[result for _, result in done])
    write_atomically(aside / SEED_RESULTS, of_seed.model_dump_json(indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


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
        whole = EvaluationReport.model_validate_json((step.folder / FRONT / REPORT).read_bytes())
        write_atomically(to / REPORT, whole.model_copy(update={"samples": []}).model_dump_json(indent=1) + "\n")
        for picture in (step.folder / FRONT).glob("front.*"):
            shutil.copy(picture, to)


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
