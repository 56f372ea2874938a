"""`sipo weights`: which preference weight to ask for, from an evaluation's report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from gateway.cli.console import console
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.wishes import Proposal, at_least, best_worst_case, most_even
from sipo.files import expanded
from sipo.preferences import format_weights, parse_weights
from sipo.validation import explain


def weights(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="The report.json of `sipo evaluate`, or its folder.")],
    *,
    method: Annotated[str | None, typer.Option(help="One of the report's. Default: the one with the greatest hypervolume.")] = None,
    least: Annotated[str | None, typer.Option("--at-least", help="Mean rewards that are wanted, such as warm=0.3.")] = None,
    most: Annotated[
        str | None, typer.Option(help="With --at-least: the objective of which as much as possible. Default: the other.")
    ] = None,
) -> None:
    """Propose preference weights: the most even gain over the base, the best worst case, or as much of one objective as a wish for
    the others allows. Only weights that were measured are proposed, with what they cost.

    Examples:

      sipo weights build/evaluation

      sipo weights build/evaluation/report.json --at-least warm=0.3
    """
    found = _read(expanded(report))
    chosen = method or max(
        (one for one in found.methods if one.points[0].weights is not None), key=lambda one: one.hypervolume.value, default=None
    )
    if chosen is None:
        raise InvalidRequest("no method of the report takes weights: evaluate one, such as --method demo=mod:demo")
    name = chosen if isinstance(chosen, str) else chosen.name
    if least is not None:
        wanted = parse_weights(least, param="--at-least")
        others = [objective for objective in found.objectives if objective not in wanted]
        if most is None and len(others) != 1:
            raise InvalidRequest(f"say with --most of which objective as much as possible: {', '.join(others or found.objectives)}")
        proposals = {f"{least}, then {most or others[0]}": at_least(found, name, wanted, most or others[0])}
    elif most is not None:
        raise InvalidRequest("--most goes with --at-least")
    else:
        proposals = {"best worst case": best_worst_case(found, name)}
        if any(one.kind == "base" for one in found.methods):
            proposals = {"most even gain": most_even(found, name)} | proposals
    _show(name, found.objectives, proposals)


def _show(method: str, objectives: list[str], proposals: dict[str, Proposal]) -> None:
    table = Table(method, "weights", *objectives, box=None, header_style="bold")
    for wish, proposal in proposals.items():
        figures = (f"{proposal.rewards[name]:.3f} (-{proposal.costs[name]:.3f})" for name in objectives)
        table.add_row(wish, format_weights(proposal.weights), *figures)
    console.print(table)
    console.print("in brackets: how much lower than the method's best")


def _read(path: Path) -> EvaluationReport:
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise NotFound(f"there is no report {file}")
    try:
        return EvaluationReport.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise InvalidRequest(f"{file} is no report of `sipo evaluate`: {explain(error)[1]}") from error
