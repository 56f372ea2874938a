"""`sipo conflicts`: how much the objectives of a data set disagree, and subsets with a chosen amount of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.console import console
from gateway.cli.data import SOURCES, SOURCES_HELP, read_sources, tell
from sipo.datasets import conflict_report, subset
from sipo.datasets.doubts import doubts
from sipo.errors import InvalidRequest
from sipo.words import counted, share


def conflicts(
    data: Annotated[list[str], typer.Argument(metavar=SOURCES, help=SOURCES_HELP)],
    *,
    subset_ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Conflict ratio of the subset to write.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Rows of the subset.")] = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Where the subset goes, as JSONL in our schema.")] = None,
    seed: Annotated[int, typer.Option(help="Which rows are drawn.")] = 0,
) -> None:
    """Count rows, labels per objective, and conflicts: overall, and for every two objectives.

    Examples:

      sipo conflicts pairs.jsonl

      sipo conflicts pairs.jsonl --subset-ratio 0.5 --size 200 --out half.jsonl
    """
    given = [value is not None for value in (subset_ratio, size, out)]
    if any(given) and not all(given):
        raise InvalidRequest("a subset needs all of --subset-ratio, --size and --out")
    dataset = read_sources(data)
    examples = dataset.labelled()
    report = conflict_report(examples)
    console.print(f"{counted(report.rows, 'row')}, read as {dataset.format}")
    labels = Table("objective", "labels", box=None, header_style="bold")
    for objective, count in report.labels.items():
        labels.add_row(objective, str(count))
    console.print(labels)
    pairs = Table("objectives", "rows with both", "conflicting", "ratio", box=None, header_style="bold")
    for pair in report.pairs:
        pairs.add_row(f"{pair.first}, {pair.second}", str(pair.rows), str(pair.conflicting), f"{pair.ratio:.3f}")
    if report.pairs:
        console.print(pairs)
    comparable = f"{share(report.conflicting, report.comparable, 'row')} with two labels or more"
    console.print(f"conflict ratio: {report.ratio:.3f} ({comparable})")
    tell(doubts(examples, list(report.labels)))
    if subset_ratio is not None and size is not None and out is not None:
        chosen = subset(examples, subset_ratio, size, seed)
        out.write_text("".join(f"{example.model_dump_json()}\n" for example in chosen), encoding="utf-8")
        console.print(f"wrote {counted(len(chosen), 'row')} to {out}", markup=False)
