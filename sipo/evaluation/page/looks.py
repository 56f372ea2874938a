"""How all pictures look, readable without colours: every method has a marker and a line style of its own as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sipo.evaluation.report import EvaluationReport, MethodResult, seed_of

COLOURS: Mapping[str, Mapping[str, str]] = {
    "--paper": {"light": "#ffffff", "dark": "#15181c"},
    "--ink": {"light": "#1c1f23", "dark": "#e8eaed"},
    "--faint": {"light": "#59616b", "dark": "#a3abb6"},
    "--rule": {"light": "#d4d8de", "dark": "#3a4049"},
    "--c0": {"light": "#5b6470", "dark": "#aab4c0"},
    "--c1": {"light": "#0072b2", "dark": "#56b4e9"},
    "--c2": {"light": "#d55e00", "dark": "#d87800"},
    "--c3": {"light": "#9000f0", "dark": "#b44cff"},
    "--c4": {"light": "#600000", "dark": "#f0c090"},
    "--c5": {"light": "#c07860", "dark": "#e8305a"},
    "--c6": {"light": "#180030", "dark": "#7878a8"},
}
"""The page's colours by CSS variable. Those of methods (--c…) differ by 20 or more in CIE Lab for each kind of colour blindness,
and by 3:1 in contrast from the paper."""

METHOD_COLOURS = [pair["light"] for name, pair in COLOURS.items() if name.startswith("--c")]
_MARKERS = "osD^vPX*<>"
_LINES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK, FAINT, RULE = (COLOURS[name]["light"] for name in ("--ink", "--faint", "--rule"))

STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": RULE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a $ in a name is a dollar
    "svg.fonttype": "none",
}
_LONGEST_NAME = 24


class Look(NamedTuple):
    """`thin`: one of several seeds."""

    colour: str
    marker: str
    line: Any
    thin: bool

    @property
    def width(self) -> float:
        return 0.8 if self.thin else 1.4

    @property
    def size(self) -> float:
        return 3.5 if self.thin else 6


def looks(report: EvaluationReport) -> dict[str, Look]:
    """By method, what tells it from others, without colours as well. The seeds of a family look alike."""
    families = families_of(report)
    return {
        method.name: Look(
            colour=METHOD_COLOURS[index % len(METHOD_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            line=_LINES[index % len(_LINES)],
            thin=len(methods) > 1,
        )
        for index, methods in enumerate(families.values())
        for method in methods
    }


def families_of(report: EvaluationReport) -> dict[str, list[MethodResult]]:
    families: dict[str, list[MethodResult]] = {}
    for method in report.methods:
        families.setdefault(method.family, []).append(method)
    return families


def legend_handle(report: EvaluationReport, methods: Sequence[MethodResult]) -> Line2D:
    """Of a family: its methods have one look."""
    own = looks(report)[methods[0].name]
    line = own.line if len(methods[0].points) > 1 else ""
    return Line2D([], [], color=own.colour, marker=own.marker, linestyle=line, label=_family_label(methods))


def _family_label(methods: Sequence[MethodResult]) -> str:
    seeds = [seed for method in methods for seed in (seed_of(method.name),) if seed]
    name = shortened(methods[0].family)
    return f"{name} (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})" if seeds else name


def panels_of(count: int, size: tuple[float, float], most: int = 3) -> tuple[Figure, list[Axes]]:
    """So many panels of this size, `most` of them in a row."""
    across = min(count, most)
    down = -(-count // across)
    # Of one panel, the legend below would be wider.
    figure = Figure(figsize=(max(across * size[0], 4.0), down * size[1] + 0.5), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def shortened(name: str) -> str:
    """Without its middle: long names differ at their ends."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2]}…{name[1 - _LONGEST_NAME // 2 :]}"
