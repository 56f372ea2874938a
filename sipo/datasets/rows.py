"""A row of a data set: values by column, and the line that it began on, so that every fault is told with its place.

Whatever the kind of file, a row has passed Row.checked: its texts are whole and its numbers finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sipo.errors import InvalidData
from sipo.preferences import is_finite_number

MAX_DEPTH = 100


@dataclass(frozen=True)
class Row:
    """`line` counts from 1; where there are no lines, the row does. A null value is as good as none."""

    line: int
    values: Mapping[str, Any]

    @classmethod
    def checked(cls, line: int, values: object) -> Row:
        """Raises InvalidData for what is no object, half a character, and a number that is not finite."""
        if not isinstance(values, Mapping):
            raise InvalidData(f"a JSON {type(values).__name__}: each row must be an object with named columns", line=line)
        _check(line, "", values, 0)
        return cls(line, values)

    def wrong(self, message: str) -> InvalidData:
        return InvalidData(message, line=self.line)

    def get(self, column: str) -> Any:
        return self.values.get(column)

    def text(self, column: str) -> str:
        value = self.get(column)
        if value is None:
            raise self.wrong(f"`{column}` is missing: it must be text")
        return self.as_text(column, value)

    def as_text(self, path: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.wrong(f"`{path}` is {short(value)}: it must be text")
        return value

    def number(self, column: str) -> float | None:
        value = self.get(column)
        if value is not None and not is_finite_number(value):
            raise self.wrong(f"`{column}` is {short(value)}: it must be a number, or absent")
        return value  # type: ignore[no-any-return]


def short(value: object) -> str:
    """For messages: never more than 60 characters of whatever somebody wrote."""
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check(line: int, path: str, value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidData(f"nested more than {MAX_DEPTH} deep: no format known here is", line=line)
    if isinstance(value, str):
        if not _is_whole(value):
            raise InvalidData(f"`{path}` has half a character (a lone surrogate): it must be whole Unicode text", line=line)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidData(f"`{path}` is {value}: a number must be finite", line=line)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            name = str(key) if _is_whole(str(key)) else ascii(key)
            inside = f"{path}.{name}" if path else name
            _check(line, inside, key, depth + 1)
            _check(line, inside, inner, depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check(line, f"{path}[{index}]", inner, depth + 1)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
