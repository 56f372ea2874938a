"""An evaluation's report for people: one HTML file that stands alone, and its pictures as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from sipo.conversation import as_text
from sipo.evaluation.page import pictures, tables, words
from sipo.evaluation.report import EvaluationReport


def write_page(report: EvaluationReport, folder: Path) -> Path:
    """Writes index.html, front.png, front.svg, hypervolume.png and hypervolume.svg into the folder, byte by byte the same for the
    same report, and returns the path of index.html, which needs none of the others."""
    front, hypervolumes = pictures.front(report), pictures.hypervolumes(report)
    page = _template().render(
        report=report,
        words=words,
        tables=tables,
        as_text=as_text,
        colours=pictures.COLOURS,
        front=pictures.inline(front, "front", words.front_in_words(report)),
        hypervolumes=pictures.inline(hypervolumes, "hypervolume", words.hypervolumes_in_words(report)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures.save(front, folder / "front")
    pictures.save(hypervolumes, folder / "hypervolume")
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


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
