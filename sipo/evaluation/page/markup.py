"""Figures as files, and as part of the page.

The same figure is saved, on white, and becomes part of the page, where its colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from io import StringIO
from pathlib import Path

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from sipo.evaluation.page.looks import COLOURS


def save(figure: Figure, path: Path) -> str:
    """As PATH.png and PATH.svg, without dates in them. Returns what the latter holds."""
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    svg = svg_of(figure, path.name)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    return svg


def inline(drawn: str, width: float, name: str, alternative: str) -> Markup:
    """An SVG picture, `width` inches wide, as an element of an HTML page: its ids begin with its name, its colours are the page's
    variables."""
    svg = ET.fromstring(drawn)
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
    # Neither letters too small to read, on a phone, nor larger than the page's own.
    style = f"min-width: {58 * width:.0f}px; max-width: {120 * width:.0f}px"
    svg.attrib.update({"role": "img", "aria-label": alternative, "style": style})
    return Markup(ET.tostring(svg, encoding="unicode", method="html"))


def svg_of(figure: Figure, salt: str) -> str:
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
