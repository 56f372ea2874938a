"""An evaluation's report, in print."""

from __future__ import annotations

from rich.table import Table

from gateway.cli.console import console
from sipo.evaluation.report import AtWeight, EvaluationReport, Interval, MethodResult
from sipo.preferences import format_weights


def show_report(report: EvaluationReport) -> None:
    for method in report.methods:
        _show_points(report, method)
    columns = ("method", "hypervolume", "IGD+", "inner product", "points on its front", "asked - got", "tokens")
    table = Table(*columns, box=None, header_style="bold")
    for method in report.methods:
        table.add_row(
            method.name,
            method.hypervolume.text(),
            method.igd_plus.text(),
            "" if method.inner_product is None else method.inner_product.text(),
            f"{len(method.front)} of {len(method.points)}",
            "" if method.calibration is None else method.calibration.difference.text(),
            str(report.tokens[method.name]),
        )
    console.print(table)
    if report.comparisons:
        _show_comparisons(report)
    if report.also:
        _show_also(report)
    for objective, found in report.agreement.items():
        console.print(
            f"{objective}: the judge orders {found.value:.1%} of pairs of answers as the exact function does", markup=False
        )
    for objective, (mean, deviation) in report.standardised.items():
        console.print(
            f"{objective}: in standard deviations ({deviation:.4g}) above the base's mean ({mean:.4g})"
            + (f", on {report.standardised_on} validation prompts" if report.standardised_on else ""),
            markup=False,
        )


def _show_points(report: EvaluationReport, method: MethodResult) -> None:
    compared = any(point.dominating for point in method.points)
    diverged = any(point.divergence for point in method.points)
    further = [*(["beat both"] if compared else []), *(["KL"] if diverged else [])]
    columns = [*report.objectives, "tokens", "truncated", "empty", "distinct", *further]
    table = Table(f"{method.name} at", *columns, box=None, header_style="bold")
    for point in method.points:
        beaten = [f"{point.dominating.value:.1%}"] if point.dominating else []
        table.add_row(
            _place(point),
            *(point.rewards[name].text() for name in report.objectives),
            f"{point.tokens.value:.1f}",
            *(f"{part:.1%}" for part in (point.truncated, point.empty, point.distinct)),
            *beaten,
            *([f"{point.divergence.value:.4f}"] if point.divergence else []),
        )
    console.print(table)
    if method.unseen:
        _show_unseen(report, method)
    console.print()


def _show_comparisons(report: EvaluationReport) -> None:
    columns = ("method", "against", "hypervolume, paired", "p (Holm)", "improvement by weight, over all objectives")
    table = Table(*columns, box=None, header_style="bold")
    for one in report.comparisons:
        averages = " ".join(f"{improved.average.value:+.3f}" for improved in one.improvements)
        table.add_row(one.method, one.against, one.difference.text("+"), f"{one.p_value:.3f}", averages)
    console.print()
    console.print(table)
    for verdict in report.verdicts:
        seeds = f" (seeds {', '.join(verdict.seeds)})" if verdict.seeds else ""
        console.print(f"{verdict.method} against {verdict.against}{seeds}: {verdict.verdict}", markup=False)


def _show_unseen(report: EvaluationReport, method: MethodResult) -> None:
    table = Table(f"{method.name} at unseen", *report.objectives, "inner product", "gap", box=None, header_style="bold")
    for one in method.unseen:
        figures = (*(one.rewards[name] for name in report.objectives), one.inner_product)
        gap = "" if one.gap is None else one.gap.text("+")
        table.add_row(format_weights(one.weights), *map(Interval.text, figures), gap)
    console.print(table)


def _show_also(report: EvaluationReport) -> None:
    """Side effects, and their differences to the base."""
    table = Table(
        "no objective", "at", *report.also, *(f"{name}, difference" for name in report.also), box=None, header_style="bold"
    )
    for method in report.methods:
        for point in method.points:
            differences = (one.text("+") for one in point.also_difference.values())
            table.add_row(method.name, _place(point), *map(Interval.text, point.also.values()), *differences)
    console.print()
    console.print(table)


def _place(point: AtWeight) -> str:
    return "no weights" if point.weights is None else format_weights(point.weights)
