"""An evaluation's report, in print."""

from __future__ import annotations

from rich.table import Table

from gateway.cli.console import console
from sipo.evaluation.report import AtWeight, EvaluationReport, Interval, MethodResult
from sipo.preferences import format_weights


def show_report(report: EvaluationReport) -> None:
    for method in report.methods:
        _show_points(report, method)
    table = Table("method", "hypervolume", "IGD+", "inner product", "points on its front", "tokens", box=None, header_style="bold")
    for method in report.methods:
        table.add_row(
            method.name,
            _interval(method.hypervolume),
            _interval(method.igd_plus),
            "" if method.inner_product is None else _interval(method.inner_product),
            f"{len(method.front)} of {len(method.points)}",
            str(report.tokens[method.name]),
        )
    console.print(table)
    if report.comparisons:
        _show_comparisons(report)
    for objective, (mean, deviation) in report.standardised.items():
        console.print(f"{objective}: in standard deviations ({deviation:.4g}) above the base's mean ({mean:.4g})", markup=False)


def _show_points(report: EvaluationReport, method: MethodResult) -> None:
    compared = any(point.dominating for point in method.points)
    columns = [*report.objectives, "tokens", "truncated", "empty", "distinct", *(["beat both"] if compared else [])]
    table = Table(f"{method.name} at", *columns, box=None, header_style="bold")
    for point in method.points:
        beaten = [f"{point.dominating.value:.1%}"] if point.dominating else []
        table.add_row(
            _place(point),
            *(_interval(point.rewards[name]) for name in report.objectives),
            f"{point.tokens.value:.1f}",
            *(f"{part:.1%}" for part in (point.truncated, point.empty, point.distinct)),
            *beaten,
        )
    console.print(table)
    console.print()


def _show_comparisons(report: EvaluationReport) -> None:
    table = Table("method", "against", "hypervolume, paired", "p (Holm)", box=None, header_style="bold")
    for one in report.comparisons:
        table.add_row(one.method, one.against, _interval(one.difference, sign="+"), f"{one.p_value:.3f}")
    console.print()
    console.print(table)


def _place(point: AtWeight) -> str:
    return "no weights" if point.weights is None else format_weights(point.weights)


def _interval(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"
