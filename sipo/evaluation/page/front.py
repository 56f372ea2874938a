"""The picture of the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sipo.evaluation.page.looks import STYLE, families_of, legend_handle, looks
from sipo.evaluation.page.words import weight, weight_names
from sipo.evaluation.report import AtWeight, EvaluationReport

Array = npt.NDArray[np.float64]


@rc_context(STYLE)
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
    handles = [legend_handle(report, methods) for methods in families_of(report).values()]
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
    shown = looks(report)
    for method in report.methods:
        own = shown[method.name]
        edge = staircase([_means(point, x, y) for point in method.points])
        _shade(axes, edge, reference, own.colour, 0.3 / (len(report.methods) + 2))
        axes.plot(*zip(*edge, strict=True), color=own.colour, linestyle=own.line, linewidth=own.width)
        for position, point in enumerate(method.points):
            for bar in _bars(point, x, y):
                axes.plot(*bar.T, color=own.colour, linewidth=own.width / 2, alpha=0.6)
            filling = own.colour if position in method.front else "none"
            axes.plot(*_means(point, x, y), marker=own.marker, markersize=own.size, color=own.colour, markerfacecolor=filling)


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
    points = [point for methods in families_of(report).values() for point in methods[0].points]  # seeds have the same weights
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


def _means(point: AtWeight, x: str, y: str) -> tuple[float, float]:
    return point.rewards[x].value, point.rewards[y].value


def _bars(point: AtWeight, x: str, y: str) -> list[Array]:
    """Where its intervals are drawn: two lines, [2, 2] each."""
    across, up = point.rewards[x], point.rewards[y]
    return [
        np.array([(across.low, up.value), (across.high, up.value)]),
        np.array([(across.value, up.low), (across.value, up.high)]),
    ]
