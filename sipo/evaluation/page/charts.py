"""The pictures beside the front: what its figures come to, and what they are made of."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sipo.evaluation.job_account import JobAccount
from sipo.evaluation.page.looks import FAINT, INK, METHOD_COLOURS, STYLE, families_of, legend_handle, looks, panels_of, shortened
from sipo.evaluation.page.words import number, places, weight, weight_names
from sipo.evaluation.report import EvaluationReport, family


@rc_context(STYLE)
def hypervolumes(report: EvaluationReport) -> Figure:
    figure = Figure(figsize=(5.0, 0.8 + 0.42 * len(report.methods)), layout="constrained")
    axes = figure.subplots()
    decimals = places(method.hypervolume for method in report.methods)
    for index, method in enumerate(report.methods):
        volume = method.hypervolume
        colour = looks(report)[method.name].colour
        axes.barh(index, volume.value, height=0.6, color=colour, alpha=0.35)
        axes.plot([volume.low, volume.high], [index, index], color=colour, linewidth=1.4, marker="|", markersize=7)
        text = number(volume.value, decimals)
        axes.annotate(text, (max(volume.high, volume.value), index), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(report.methods)), [shortened(method.name) for method in report.methods])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("hypervolume")
    return figure


@rc_context(STYLE)
def calibrations(report: EvaluationReport) -> Figure | None:
    """The share of an objective that a weight got over the one that it asked for; of two objectives the first says all."""
    methods = [method for method in report.methods if method.calibration]
    if not methods:
        return None
    two = len(report.objectives) == 2
    objectives = report.objectives[:1] if two else report.objectives
    figure, panels = panels_of(len(objectives), (4.2, 4.2) if two else (3.0, 3.0))
    shown = looks(report)
    for axes, objective in zip(panels, objectives, strict=True):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
        for method in methods:
            own = shown[method.name]
            shares = sorted(
                (point.weights[objective], point.got[objective]) for point in method.points if point.weights and point.got
            )
            axes.plot(
                *zip(*shares, strict=True),
                color=own.colour,
                marker=own.marker,
                markersize=own.size,
                linestyle=own.line if two else "",
                linewidth=own.width,
                clip_on=False,
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=f"weight of {objective}, asked", ylabel="share, got")
    handles = [legend_handle(report, of_family) for of_family in families_of(report).values() if of_family[0].calibration]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure


@rc_context(STYLE)
def improvements(report: EvaluationReport) -> Figure | None:
    """The mean of all objectives' differences at each weight (Figure 12), a panel for each family that others are compared with."""
    compared = [one for one in report.comparisons if any(improved.weights for improved in one.improvements)]
    if not compared:
        return None
    names, shown = weight_names(report), looks(report)
    against = list(dict.fromkeys(family(one.against) for one in compared))
    places_of = {name: index for index, name in enumerate(names)}
    figure, panels = panels_of(len(against), (3.4, 2.8))
    for axes, other in zip(panels, against, strict=True):
        own = [one for one in compared if family(one.against) == other]
        for index, one in enumerate(own):
            of_method = shown[one.method]
            shift = 0.5 * ((index + 0.5) / len(own) - 0.5)  # side by side, so that intervals do not lie on each other
            at = [(places_of[weight(improved.weights)] + shift, improved.average) for improved in one.improvements]
            xs = [x for x, _ in at]
            axes.plot(
                xs,
                [average.value for _, average in at],
                color=of_method.colour,
                marker=of_method.marker,
                markersize=of_method.size * 0.8,
                linestyle=of_method.line if len(report.objectives) == 2 else "",  # of more, weights have no order
                linewidth=of_method.width,
            )
            for x, average in at:
                axes.plot([x, x], [average.low, average.high], color=of_method.colour, linewidth=of_method.width)
        axes.axhline(0, color=INK, linewidth=0.9)
        axes.set_xticks(range(len(names)), list(names.values()), fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.set_title(f"over {shortened(other)}", fontsize=10)
        axes.set_xlabel(f"weight of {report.objectives[0]}" if len(report.objectives) == 2 else "weights")
    families = families_of(report)
    handles = [legend_handle(report, families[name]) for name in dict.fromkeys(family(one.method) for one in compared)]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


@rc_context(STYLE)
def rewards(report: EvaluationReport, objective: str) -> Figure | None:
    """How the rewards of one objective spread: a panel for every method, in it a histogram for every weight, with its mean."""
    if objective not in report.bins:
        return None
    edges = report.bins[objective]
    names, shown = weight_names(report), looks(report)
    most = max(count for method in report.methods for point in method.points for count in point.histograms[objective])
    rows = max(len(method.points) for method in report.methods)
    figure, panels = panels_of(len(report.methods), (2.5, 0.6 + 0.34 * rows), most=4)
    for axes, method in zip(panels, report.methods, strict=True):
        colour = shown[method.name].colour
        for row, point in enumerate(method.points):
            heights = np.array(point.histograms[objective]) / most * 0.85
            axes.stairs(row + heights, edges, baseline=row, fill=True, color=colour, alpha=0.35)
            axes.stairs(row + heights, edges, baseline=row, color=colour, linewidth=0.8)
            mean = point.rewards[objective].value
            axes.plot([mean, mean], [row, row + 0.85], color=INK, linewidth=1.1)
        labels = [names[weight(point.weights)] if point.weights else "" for point in method.points]
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(-0.08, rows)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines["left"].set_visible(False)
        axes.set_title(shortened(method.name), fontsize=9)
    figure.supxlabel(objective, fontsize=10)
    return figure


@rc_context(STYLE)
def curves(job: JobAccount) -> Figure | None:
    """Losses over steps, in training and on the validation pairs, a panel for every training whose history is known."""
    known = [training for training in job.trainings if training.curve]
    if not known:
        return None
    figure, panels = panels_of(len(known), (2.7, 2.1), most=4)
    for axes, training in zip(panels, known, strict=True):
        for validation, style in ((False, {"linewidth": 0.9}), (True, {"marker": "o", "markersize": 4, "linewidth": 1.4})):
            points = [(point.step, point.loss) for point in training.curve if point.validation == validation]
            if points:
                colour = METHOD_COLOURS[2 if validation else 1]
                axes.plot(*zip(*points, strict=True), color=colour, **style)
        when = f"round {training.round}" if training.round else "first alignment"
        axes.set_title(f"{shortened(training.objective)}, {when}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [
        Line2D([], [], color=METHOD_COLOURS[1], linewidth=0.9, label="loss in training"),
        Line2D([], [], color=METHOD_COLOURS[2], marker="o", markersize=4, label="on validation pairs"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("step", fontsize=10)
    return figure
