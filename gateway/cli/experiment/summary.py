"""The summary of an experiment's seeds in print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from gateway.cli.console import console
from gateway.experiments.summary import EvaluationSummary, Summary
from sipo.evaluation.report import Verdict


def show_summary(summary: Summary) -> None:
    if summary.left_out:
        console.print(
            f"left out, as their results are of another definition, data or preset: {_seeds(summary.left_out)}; running them again "
            "replaces these results",
            markup=False,
        )
    for name, evaluation in summary.evaluations.items():
        console.print()
        if evaluation.seeds:
            _show_evaluation(name, evaluation)
        if evaluation.missing:
            console.print(f"{name} is incomplete: there is no report of {_seeds(evaluation.missing)}", markup=False)


def _show_evaluation(name: str, evaluation: EvaluationSummary) -> None:
    volumes = {(one.method, one.seed): one.hypervolume.text() for one in evaluation.hypervolumes}
    table = Table(f"{name}, hypervolume", *(f"seed {seed}" for seed in evaluation.seeds), box=None, header_style="bold")
    for method in dict.fromkeys(one.method for one in evaluation.hypervolumes):
        table.add_row(method, *(volumes[method, seed] for seed in evaluation.seeds))
    console.print(table)
    console.print()
    table = Table("method", "against", "hypervolume, paired", "p", "p (Holm)", box=None, header_style="bold")
    for one in evaluation.comparisons:
        table.add_row(one.method, one.against, one.difference.text("+"), f"{one.uncorrected:.4f}", f"{one.p_value:.4f}")
    console.print(table)
    console.print()
    for verdict in evaluation.verdicts:
        console.print(_in_words(verdict, evaluation.missing), markup=False)


def _in_words(verdict: Verdict, missing: Sequence[int]) -> str:
    of = _seeds(list(map(int, verdict.seeds)))
    return f"{verdict.method} against {verdict.against} ({of}): {verdict.verdict}{', incomplete' if missing else ''}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
