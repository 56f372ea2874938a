"""Pictures of an evaluation, readable without colours: every method has a marker and a line style of its own as well.

The same figure is saved, on white, and becomes part of the page, where its colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sipo.evaluation.page.words import number, places, weight, weight_names
from sipo.evaluation.report import AtWeight, EvaluationReport, MethodResult

Array = npt.NDArray[np.float64]

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

_METHOD_COLOURS = [pair["light"] for name, pair in COLOURS.items() if name.startswith("--c")]
_MARKERS = "osD^vPX*<>"
_LINES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_INK, _RULE = COLOURS["--ink"]["light"], COLOURS["--rule"]["light"]

_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _RULE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a $ in a name is a dollar
    "svg.fonttype": "none",
}
_LONGEST_NAME = 24


class Look(NamedTuple):
    colour: str
    marker: str
    line: Any


def look(index: int) -> Look:
    """What tells the method with this index from others, without colours as well."""
    return Look(
        colour=_METHOD_COLOURS[index % len(_METHOD_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        line=_LINES[index % len(_LINES)],
    )


# The front


@rc_context(_STYLE)
def front(report: EvaluationReport) -> Figure:
    """Mean rewards of every method and weight; of more than two objectives, a matrix of every pair."""
    size = len(report.objectives) - 1
    figure = Figure(figsize=(5.0, 5.0) if size == 1 else (3.0 * size, 2.9 * size), layout="constrained")
    panels = figure.subplots(size, size, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    shown = []
    for column, row in combinations(range(size + 1), 2):
        axes = panels[row - 1, column]
        axes.set_visible(True)
        _draw_pair(axes, report, report.objectives[column], report.objectives[row])
        shown.append((axes, report.objectives[column], report.objectives[row]))
    handles = [_legend_handle(index, method) for index, method in enumerate(report.methods)]
    figure.legend(handles=handles, loc="outside lower left", ncols=2 * size, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # fixes the axes' places, by which labels find theirs
    for axes, x, y in shown:
        _label_points(axes, report, x, y)
    return figure


def _draw_pair(axes: Axes, report: EvaluationReport, x: str, y: str) -> None:
    reference = (report.reference_point[x], report.reference_point[y])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _set_limits(axes, report, x, y)
    for index, method in enumerate(report.methods):
        colour, marker, line = look(index)
        edge = staircase([_means(point, x, y) for point in method.points])
        _shade(axes, edge, reference, colour, 0.3 / (len(report.methods) + 2))
        axes.plot(*zip(*edge, strict=True), color=colour, linestyle=line, linewidth=1.4)
        for position, point in enumerate(method.points):
            for bar in _bars(point, x, y):
                axes.plot(*bar.T, color=colour, linewidth=0.7, alpha=0.6)
            filling = colour if position in method.front else "none"
            axes.plot(*_means(point, x, y), marker=marker, markersize=6, color=colour, markerfacecolor=filling)


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The front of points in two objectives, from left to right."""
    edge: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not edge or point[1] > edge[-1][1]:
            edge.append(point)
    return edge[::-1]


def _shade(axes: Axes, edge: Sequence[tuple[float, float]], reference: tuple[float, float], colour: str, alpha: float) -> None:
    """What the edge dominates, down to the reference point: a step from each of its points to the left."""
    corners = [(max(x, reference[0]), max(y, reference[1])) for x, y in edge]
    axes.fill_between(
        [reference[0], *(x for x, _ in corners)],
        [corners[0][1], *(y for _, y in corners)],
        reference[1],
        step="pre",
        color=colour,
        alpha=alpha,
        linewidth=0,
    )


def _set_limits(axes: Axes, report: EvaluationReport, x: str, y: str) -> None:
    """All intervals; and the reference point, unless it is so far off that they would crowd in a corner."""
    for name, set_limits in ((x, axes.set_xlim), (y, axes.set_ylim)):
        rewards = [point.rewards[name] for method in report.methods for point in method.points]
        low, high = min(reward.low for reward in rewards), max(reward.high for reward in rewards)
        reference = report.reference_point[name]
        if abs(reference - low) <= 2 * (high - low):
            low, high = min(low, reference), max(high, reference)
        margin = 0.05 * (high - low) or 0.1
        set_limits(low - margin, high + margin)


def _label_points(axes: Axes, report: EvaluationReport, x: str, y: str) -> None:
    """Each point's weight beside it, clear of lines if it can be, and left out where it would lie on a point or another label."""
    names = weight_names(report)
    pixels = axes.figure.dpi / 72
    points = [point for method in report.methods for point in method.points]
    centres = axes.transData.transform([_means(point, x, y) for point in points])
    taken = _boxes(centres, [8 * pixels, 8 * pixels])
    dots = np.concatenate([_dots(axes.transData.transform(line.get_xydata())) for line in axes.lines])
    lines = _boxes(dots, [pixels, pixels])
    for point, centre in zip(points, centres, strict=True):
        if point.weights is None:
            continue
        label = axes.annotate(names[weight(point.weights)], _means(point, x, y), (0, 0), **_LABEL)
        width, height = label.get_window_extent().size
        # With a little room at its sides: "1" and "1" are not "11".
        boxes = _boxes(centre + _OFFSETS * pixels, (width + 4 * pixels, height))
        covered = _overlaps(boxes, taken)
        # Of equal ones lexsort takes the first, which is near and to the upper right.
        best = np.lexsort([_overlaps(boxes, lines), covered])[0]
        if covered[best]:
            label.remove()
        else:
            label.set_position(_OFFSETS[best])
            taken = np.concatenate([taken, boxes[best : best + 1]])


_LABEL: Mapping[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8}
_ANGLES = (np.arange(16) + 2) * np.pi / 8
_OFFSETS = np.concatenate([distance * np.column_stack([np.cos(_ANGLES), np.sin(_ANGLES)]) for distance in (8, 11, 15)])
"""Where a label's middle may lie from its point: [choices, 2], in points of type."""


def _dots(path: Array) -> Array:
    """Points along a path [n, 2], close enough for no label to slip between them: [m, 2]."""
    steps = np.linspace(0, 1, 50)[:, None]
    return np.concatenate([path, *(start + steps * (end - start) for start, end in pairwise(path))])


def _boxes(middles: Array, size: Sequence[float]) -> Array:
    """[n, 4]: left, lower, right and upper edge."""
    return np.hstack([middles - np.array(size) / 2, middles + np.array(size) / 2])


def _overlaps(boxes: Array, others: Array) -> Array:
    """Of each box [n, 4] the area that it shares with others [m, 4]: [n]."""
    shared = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
    total: Array = shared.clip(min=0).prod(axis=-1).sum(axis=-1)
    return total


def _legend_handle(index: int, method: MethodResult) -> Line2D:
    colour, marker, line = look(index)
    line = line if len(method.points) > 1 else ""
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=_shortened(method.name))


# Hypervolumes


@rc_context(_STYLE)
def hypervolumes(report: EvaluationReport) -> Figure:
    figure = Figure(figsize=(5.0, 0.8 + 0.42 * len(report.methods)), layout="constrained")
    axes = figure.subplots()
    decimals = places(method.hypervolume for method in report.methods)
    for index, method in enumerate(report.methods):
        volume = method.hypervolume
        colour = look(index).colour
        axes.barh(index, volume.value, height=0.6, color=colour, alpha=0.35)
        axes.plot([volume.low, volume.high], [index, index], color=colour, linewidth=1.4, marker="|", markersize=7)
        text = number(volume.value, decimals)
        axes.annotate(text, (max(volume.high, volume.value), index), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(report.methods)), [_shortened(method.name) for method in report.methods])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("hypervolume")
    return figure


# Files and markup


def save(figure: Figure, path: Path) -> None:
    """As PATH.png and PATH.svg, without dates in them."""
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    path.with_suffix(".svg").write_text(_svg(figure, path.name), encoding="utf-8")


def inline(figure: Figure, name: str, alternative: str) -> Markup:
    """The figure as an element of an HTML page: its ids begin with its name, its colours are the page's variables."""
    svg = ET.fromstring(_svg(figure, name))
    for key in ("width", "height"):
        del svg.attrib[key]
    for child in list(svg):
        # Metadata name addresses in vain, and a style sheet would style the whole page.
        if child.tag.endswith("metadata") or child.find("{*}style") is not None:
            svg.remove(child)
    for element in svg.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): _with_variables(value) for key, value in element.attrib.items()}
        for key, value in attributes.items():
            if key == "id":
                attributes[key] = f"{name}-{value}"
            elif key == "href":
                attributes[key] = value.replace("#", f"#{name}-")
            elif key == "clip-path":
                attributes[key] = value.replace("url(#", f"url(#{name}-")
        element.attrib.clear()
        element.attrib.update(attributes)
    width = figure.get_figwidth()
    # Neither letters too small to read, on a phone, nor larger than the page's own.
    style = f"min-width: {58 * width:.0f}px; max-width: {120 * width:.0f}px"
    svg.attrib.update({"role": "img", "aria-label": alternative, "style": style})
    return Markup(ET.tostring(svg, encoding="unicode", method="html"))


def _svg(figure: Figure, salt: str) -> str:
    """The salt makes its ids the same every time."""
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _with_variables(style: str) -> str:
    variables = {pair["light"]: f"var({variable})" for variable, pair in COLOURS.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: variables.get(colour[0], colour[0]), style)


def _local(name: str) -> str:
    """Without its namespace, which HTML has no use for."""
    return name.rpartition("}")[2]


def _means(point: AtWeight, x: str, y: str) -> tuple[float, float]:
    return point.rewards[x].value, point.rewards[y].value


def _bars(point: AtWeight, x: str, y: str) -> list[Array]:
    """Where its intervals are drawn: two lines, [2, 2] each."""
    across, up = point.rewards[x], point.rewards[y]
    return [
        np.array([(across.low, up.value), (across.high, up.value)]),
        np.array([(across.value, up.low), (across.value, up.high)]),
    ]


def _shortened(name: str) -> str:
    """Without its middle: long names differ at their ends."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2]}…{name[1 - _LONGEST_NAME // 2 :]}"
