"""Files of rows that only one command knows; the first row's columns tell them from the labelled data that all commands read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from gateway.cli.console import complaints
from sipo.datasets import read_source
from sipo.errors import InvalidData, InvalidRequest
from sipo.preferences import Example

M = TypeVar("M", bound=BaseModel)


def read_rows_or_examples(data: str, row: type[M], columns: set[str], needs: str) -> list[tuple[int, M]] | list[Example]:
    """The rows with their line numbers if the first one of a JSONL file has `columns`, otherwise the labelled examples that the
    file (or the hub name) holds. Raises InvalidData for the first wrong line, saying what a row `needs`; NotFound if there is no
    such file."""
    try:
        if (rows := _rows(Path(data).expanduser(), row, columns, needs)) is not None:
            return rows
        reading = read_source(data)
    except OSError as error:
        raise InvalidRequest(f"cannot read {data}: {error}") from error
    for reason, count in reading.left_out.items():
        complaints.print(f"left out: {count} times {reason}")
    return list(reading.examples)


def _rows(path: Path, row: type[M], columns: set[str], needs: str) -> list[tuple[int, M]] | None:
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    try:
        first = json.loads(lines[0][1]) if lines else {}
    except ValueError:
        return None
    if not isinstance(first, dict) or not columns <= first.keys():
        return None
    return [(number, _row(number, line, row, needs)) for number, line in lines]


def _row(number: int, line: bytes, row: type[M], needs: str) -> M:
    try:
        return row.model_validate_json(line)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in fault["loc"])
        raise InvalidData(f"{where}{fault['msg']}; {needs}", line=number) from error
