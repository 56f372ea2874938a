"""What the seeds of an experiment say together: results/NAME/summary.json, made from the results of those that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from gateway.experiments.definition import Evaluate
from gateway.experiments.plan import Plan
from gateway.experiments.published import read_seeds, results_folder, seed_folder
from sipo.evaluation.bootstrap import holm
from sipo.evaluation.comparing import verdict
from sipo.evaluation.folder import REPORT
from sipo.evaluation.report import Comparison, EvaluationReport, Interval, Verdict
from sipo.files import write_atomically
from sipo.record import Record

SUMMARY = "summary.json"


class SeedHypervolume(Record):
    method: str
    seed: int
    hypervolume: Interval


class EvaluationSummary(Record):
    """An evaluation over the seeds that there are. In comparisons, a method's name ends with its seed: `sipo@1`."""

    seeds: list[int] = Field(description="that have a report")
    missing: list[int] = Field(description="seeds of the experiment that have none: while there are any, verdicts are preliminary")
    hypervolumes: list[SeedHypervolume]
    comparisons: list[Comparison] = Field(description="p values are corrected by Holm's method over all methods and seeds")
    verdicts: list[Verdict]


class Summary(Record):
    experiment: str
    description: str
    key: str = Field(description="of all that a seed's results are made from, but for the seed")
    left_out: list[int] = Field(description="seeds whose results are of another key")
    evaluations: dict[str, EvaluationSummary]


def summarise(plan: Plan) -> Summary:
    """Of what lies in the experiment's results, whichever machine made it."""
    results, experiment = results_folder(plan), plan.experiment
    of_key = {one.seed: one.key == plan.key for one in read_seeds(results)}
    evaluations = [stage.name for stage in experiment.stages if isinstance(stage, Evaluate)]
    fitting = [seed for seed, fits in of_key.items() if fits]
    return Summary(
        experiment=experiment.name,
        description=experiment.description,
        key=plan.key,
        left_out=[seed for seed, fits in of_key.items() if not fits],
        evaluations={name: over_seeds(_reports(results, name, fitting), experiment.seeds) for name in evaluations},
    )


def write_summary(plan: Plan) -> Summary:
    """In place of the one before."""
    summary = summarise(plan)
    write_atomically(results_folder(plan) / SUMMARY, summary.model_dump_json(indent=1) + "\n")
    return summary


def over_seeds(reports: Mapping[int, EvaluationReport], seeds: Sequence[int]) -> EvaluationSummary:
    """`reports` by seed, of the same evaluation, whose methods' names are without seeds; `seeds`: all that there are to be."""
    pairs = dict.fromkeys((one.method, one.against) for report in reports.values() for one in report.comparisons)
    uncorrected = [
        _of_seed(one, seed)
        for pair in pairs
        for seed, report in reports.items()
        for one in report.comparisons
        if (one.method, one.against) == pair
    ]
    corrected = holm([one.p_value for one in uncorrected])
    compared = [one.model_copy(update={"p_value": p_value}) for one, p_value in zip(uncorrected, corrected, strict=True)]
    return EvaluationSummary(
        seeds=list(reports),
        missing=[seed for seed in seeds if seed not in reports],
        hypervolumes=[
            SeedHypervolume(method=method.name, seed=seed, hypervolume=method.hypervolume)
            for seed, report in reports.items()
            for method in report.methods
        ],
        comparisons=compared,
        verdicts=[verdict(*pair, compared) for pair in pairs],
    )


def _of_seed(one: Comparison, seed: int) -> Comparison:
    """With the seed in its names, and the p value uncorrected."""
    assert one.uncorrected is not None, "seeds' results are younger than the field"
    names = {"method": f"{one.method}@{seed}", "against": f"{one.against}@{seed}"}
    return one.model_copy(update={**names, "p_value": one.uncorrected, "improvements": []})


def _reports(results: Path, evaluation: str, seeds: Sequence[int]) -> dict[int, EvaluationReport]:
    """By seed: of those whose evaluation is finished."""
    paths = {seed: seed_folder(results, seed) / evaluation / REPORT for seed in seeds}
    return {seed: EvaluationReport.model_validate_json(path.read_bytes()) for seed, path in paths.items() if path.is_file()}
