"""An evaluation's report, or what is known of a job, for people: HTML files that stand alone, and pictures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from sipo.conversation import as_text
from sipo.datasets import ConflictReport
from sipo.evaluation.job_account import JobAccount
from sipo.evaluation.page import charts, tables, words
from sipo.evaluation.page.front import front
from sipo.evaluation.page.looks import COLOURS
from sipo.evaluation.page.markup import inline, save, svg_of
from sipo.evaluation.report import Comparison, EvaluationReport
from sipo.files import write_atomically

_DRAWING = Lock()
"""How pictures look is said in matplotlib's settings, which all threads share."""


@dataclass(frozen=True)
class Evaluated:
    """What the evaluation of a job's round came to. `found`: the policies after the round against those before, or why nothing was
    found; `link` to its page, where it has one."""

    round: int
    prompts: int
    found: Comparison | str
    link: str | None


def write_page(report: EvaluationReport, folder: Path) -> Path:
    """Writes index.html and its pictures, each as PNG and SVG, into the folder, byte by byte the same for the same report, and
    returns the path of index.html, which needs none of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    with _DRAWING:
        drawn = {
            name: inline(save(figure, folder / name), figure.get_figwidth(), name, alternative)
            for name, figure, alternative in _pictures(report)
            if figure is not None
        }
    path = folder / "index.html"
    path.write_text(_rendered("page.html", report=report, drawn=drawn), encoding="utf-8")
    return path


def write_job_page(
    job: JobAccount, path: Path, *, data: Mapping[str, ConflictReport] | None = None, evaluations: Sequence[Evaluated] = ()
) -> None:
    """Writes a job's page, which stands alone but for its links, whole or not at all. `data`: how much the objectives of its input
    disagree, by what that is called."""
    name, drawn = "training-1", {}
    with _DRAWING:
        if (figure := charts.curves(job)) is not None:
            drawn[name] = inline(svg_of(figure, name), figure.get_figwidth(), name, words.curves_in_words(job))
    write_atomically(path, _rendered("job.html", job=job, data=data or {}, evaluations=evaluations, drawn=drawn))


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
        yield f"training-{count}", charts.curves(job), words.curves_in_words(job)


def _rendered(template: str, **shown: Any) -> str:
    # What models said and how methods are called is text: everything is escaped but the pictures, which are markup of our own.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(words=words, tables=tables, as_text=as_text, colours=COLOURS, **shown)
