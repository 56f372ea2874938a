"""CSV: cells are text, so the columns' names say what they hold."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

from sipo.datasets.rows import Row, short
from sipo.errors import InvalidData

_NUMBERS = {
    *("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
    *("better_response_id", "safer_response_id", "preference_strength", "overall_preference"),
}
_BOOLEANS = {"is_safe"}
_JSON = {"labels", "responses", "completions", "context", "conversations"}
_TEXTS_OR_MESSAGES = {"prompt", "chosen", "rejected"}
_MAY_BE_EMPTY = {"response", "response_0", "response_1", "response_2", "response1", "response2", "chosen", "rejected"}
"""An empty cell of these is an empty answer; of others, no value."""

LABEL = "labels."
"""Begins the column of one objective's labels, as in labels.helpful."""

_MAX_CELL = 2**31 - 1


def table_rows(text: str, delimiter: str) -> Iterator[Row]:
    """A row's line is the one that it begins on. Raises InvalidData."""
    csv.field_size_limit(_MAX_CELL)
    cells = _cells(text, delimiter)
    line, header = next(cells, (1, []))
    if doubled := [name for name in header if header.count(name) > 1]:
        raise InvalidData(f"two columns are called {short(doubled[0])}: each needs a name of its own", line=line)
    for line, row in cells:
        if len(row) != len(header):
            raise InvalidData(f"{len(row)} cells, where the first line names {len(header)} columns", line=line)
        cells_by_column = dict(zip(header, row, strict=True))
        values = {column: _value(column, cell, line) for column, cell in cells_by_column.items()}
        if labels := {column.removeprefix(LABEL): values.pop(column) for column in header if column.startswith(LABEL)}:
            values["labels"] = labels
        yield Row.checked(line, values)


def _cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((f"{line}\n" for line in text.split("\n")), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InvalidData(f"not CSV ({error})", line=line) from error
        if row is None:
            return
        if row:
            yield line, row


def _value(column: str, cell: str, line: int) -> Any:
    if not cell:
        return "" if column in _MAY_BE_EMPTY else None
    if column in _NUMBERS or column.startswith(LABEL):
        return _number(cell)
    if column in _BOOLEANS:
        return {"true": True, "false": False, "1": True, "0": False}.get(cell.strip().lower(), cell)
    if column in _JSON:
        return _structure(column, cell, line)
    if column in _TEXTS_OR_MESSAGES and cell.lstrip().startswith("["):
        return _messages_or_text(cell)
    return cell


def _number(cell: str) -> float | str:
    """Text that is no number stays, for the format to refuse. Whole numbers are whole, however a spreadsheet wrote them."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    return int(number) if number.is_integer() else number


def _structure(column: str, cell: str, line: int) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"`{column}` is {short(cell)}: in a table it must be JSON", line=line) from error


def _messages_or_text(cell: str) -> Any:
    """Messages only where it can be nothing else: an answer may begin with a bracket, or be JSON."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    messages = [isinstance(turn, dict) and bool(turn.keys() & {"role", "from"}) for turn in value]
    return value if messages and all(messages) else cell
