"""`sipo conflicts`: how much the objectives of a data set disagree, and subsets with a chosen amount of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.console import console
from sipo.datasets import conflict_report, read_source, subset
from sipo.errors import InvalidRequest


def conflicts(
    data: Annotated[str, typer.Argument(metavar="FILE", help="In our schema, PKU-SafeRLHF's or HelpSteer's; or a hub name.")],
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
    reading = read_source(data)
    report = conflict_report(reading.examples)
    console.print(f"{report.rows} rows, read as {reading.format}")
    for reason, count in reading.left_out.items():
        console.print(f"left out: {count} times {reason}")
    labels = Table("objective", "labels", box=None, header_style="bold")
    for objective, count in report.labels.items():
        labels.add_row(objective, str(count))
    console.print(labels)
    pairs = Table("objectives", "rows with both", "conflicting", "ratio", box=None, header_style="bold")
    for pair in report.pairs:
        pairs.add_row(f"{pair.first}, {pair.second}", str(pair.rows), str(pair.conflicting), f"{pair.ratio:.3f}")
    console.print(pairs)
    console.print(f"conflict ratio: {report.ratio:.3f} ({report.conflicting} of {report.comparable} rows with two labels or more)")
    if subset_ratio is not None and size is not None and out is not None:
        chosen = subset(reading.examples, subset_ratio, size, seed)
        out.write_text("".join(f"{example.model_dump_json()}\n" for example in chosen))
        console.print(f"wrote {len(chosen)} rows to {out}", markup=False)
