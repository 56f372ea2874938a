"""What every benchmark prints and keeps: a table, and build/bench/NAME.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent.parent / "build" / "bench"


@dataclass(frozen=True)
class Figure:
    """`bar` is the least value that holds (the most, if `at_most`); None for what is only told."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def report(name: str, machine: str, figures: list[Figure]) -> None:
    table = Table(title=f"{name}: {machine}")
    for column in ("figure", "value", "unit", "bar", "holds"):
        table.add_column(column, justify="right" if column in ("value", "bar") else "left")
    for figure in figures:
        bar = "" if figure.bar is None else f"{'≤' if figure.at_most else '≥'} {figure.bar:g}"
        holds = {None: "", True: "yes", False: "NO"}[figure.holds]
        table.add_row(figure.name, f"{figure.value:.3g}", figure.unit, bar, holds)
    Console(width=120).print(table)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = [
        {key: value for key, value in asdict(figure).items() if key != "at_most"} | {"holds": figure.holds} for figure in figures
    ]
    (FOLDER / f"{name}.json").write_text(json.dumps({"machine": machine, "figures": rows}, indent=1) + "\n")
