"""An evaluation's report for people: one HTML file that stands alone, and its pictures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from sipo.conversation import as_text
from sipo.evaluation.page import charts, tables, words
from sipo.evaluation.page.front import front
from sipo.evaluation.page.looks import COLOURS
from sipo.evaluation.page.markup import inline, save
from sipo.evaluation.report import EvaluationReport


def write_page(report: EvaluationReport, folder: Path) -> Path:
    """Writes index.html and its pictures, each as PNG and SVG, into the folder, byte by byte the same for the same report, and
    returns the path of index.html, which needs none of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        name: inline(save(figure, folder / name), figure.get_figwidth(), name, alternative)
        for name, figure, alternative in _pictures(report)
        if figure is not None
    }
    page = _template().render(
        report=report,
        words=words,
        tables=tables,
        as_text=as_text,
        colours=COLOURS,
        drawn=drawn,
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _pictures(report: EvaluationReport) -> Iterator[tuple[str, Figure | None, str]]:
    """With their names and what they show in words; None where the report has nothing for one."""
    yield "front", front(report), words.front_in_words(report)
    yield "hypervolume", charts.hypervolumes(report), words.hypervolumes_in_words(report)
    yield "calibration", charts.calibrations(report), words.calibrations_in_words(report)
    yield "improvement", charts.improvements(report), words.improvements_in_words(report)
    for count, objective in enumerate(report.objectives, start=1):
        yield (
            f"rewards-{count}",
            charts.rewards(report, objective),
            f"Histograms of the rewards of {objective}, by method and weight.",
        )
    for count, job in enumerate(report.jobs, start=1):
        yield f"training-{count}", charts.curves(job), f"Losses of the trainings of {job.job} over their steps."


def _template() -> Template:
    # What models said and how methods are called is text: everything is escaped but the pictures, which are markup of our own.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
