"""What pydantic finds wrong with a record, in the words of whoever wrote it: which field, and what it must be.

Every place that shows such an error to a caller or an operator asks here, so that one mistake reads the same everywhere.
"""

from __future__ import annotations

import json
import types
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sipo.words import counted

SHOWN = 60
"""Characters of a wrong value that are shown."""

_WHOLE: Mapping[str, str] = {
    "missing": "is missing",
    "extra_forbidden": "is no known field",
    "json_invalid": "not JSON ({error})",
    "value_error": "{error}",
}
_MUST_BE: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a mapping of names to values",
    "model_attributes_type": "a mapping of names to values",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "string_pattern_mismatch": "a text of the form {pattern}",
    "url_parsing": "a URL, such as http://host:8000/v1",
    "url_scheme": "a URL that begins with {expected_schemes}",
}


def explain(error: ValidationError, model: type[BaseModel] | None = None, *, at: str = "") -> tuple[str, str]:
    """The path of the field at fault ("" for the whole), and a sentence about it without a full stop.

    `model` is what was read: with it, the sentence says which name was meant by an unknown one. `at`: where the record itself
    lies, which the path then begins with. Of several errors the first is told; an unknown name goes before them, as a field that
    is missing is often the one that was misspelt.
    """
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    steps = first["loc"]
    path = ".".join(map(str, (at, *steps) if at else steps))
    if first["type"] == "extra_forbidden":
        home = _class_at(model, steps[:-1])
        return path, f"`{path}` is no known field{_meant(str(steps[-1]), home.model_fields if home else ())}"
    what = requirement(first)
    if first["type"] in ("missing", "json_invalid", "value_error"):
        # What our own validators say names its values itself.
        return path, f"`{path}` {what}" if path and first["type"] == "missing" else f"{path}: {what}" if path else what
    return path, f"{f'`{path}`' if path else 'it'} {what}, not {_shown(first['input'])}"


def requirement(detail: ErrorDetails) -> str:
    """What the value must be: "must be a whole number". It shows nothing of the value, which may hold a key."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _WHOLE:
        return _WHOLE[kind].format(**context)
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        return _size(kind, context)
    if kind in _MUST_BE:
        return f"must be {_MUST_BE[kind].format(**context)}"
    return detail["msg"].replace("Input should be", "must be")


def _size(kind: str, context: Mapping[str, Any]) -> str:
    thing = "character" if kind.startswith("string") else "item"
    if "max_length" in context:
        return f"must have at most {counted(context['max_length'], thing)}"
    least = context["min_length"]
    return "must not be empty" if least == 1 else f"must have at least {counted(least, thing)}"


def _meant(name: str, known: Collection[str]) -> str:
    if close := get_close_matches(name, known, n=1):
        return f": did you mean `{close[0]}`?"
    return f": there are {', '.join(known)}" if known else ""


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _class_at(model: type[BaseModel] | None, steps: Sequence[int | str]) -> type[BaseModel] | None:
    """The class of the record that lies at `steps` within a `model`, where that is plain to see."""
    annotation: Any = model
    for step in steps:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and step in annotation.model_fields:
            annotation = _bare(annotation.model_fields[str(step)].annotation)
        elif get_args(annotation):  # of a list or a mapping
            annotation = _bare(get_args(annotation)[-1])
        else:
            return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _bare(annotation: Any) -> Any:
    """Without what is wrapped around it, and without the None of an optional field."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _bare(kinds[0]) if len(kinds) == 1 else None
    return annotation
