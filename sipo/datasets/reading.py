"""The one reader: of files, uploads, rows at hand and the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sipo.datasets.dataset import Dataset
from sipo.datasets.files import ENDINGS, rows_of
from sipo.datasets.formats import dataset_of
from sipo.datasets.hub import hub_rows, is_hub_name
from sipo.datasets.rows import Row
from sipo.errors import InvalidRequest, NotFound
from sipo.files import expanded


def read(source: str | Path, *, held_out: bool = False) -> Dataset:
    """Of a file, or of the hub's data set NAME or NAME:SPLIT. Rows whose `split` holds them out of training are left out, unless
    `held_out`.

    Raises InvalidData for the first wrong line, NotFound if there is no such source, Unavailable if the hub cannot be reached,
    InvalidRequest for a file that cannot be opened.
    """
    path = expanded(source)
    content = _content(path)
    if content is not None:
        return dataset_of(rows_of(content, path.name), held_out=held_out)
    if str(source).lower().endswith(ENDINGS) or not is_hub_name(str(source)):
        raise NotFound(f"there is no file {path}", param="data")
    return dataset_of(hub_rows(str(source)), held_out=held_out)


def read_upload(content: bytes, name: str = "") -> Dataset:
    """Of the bytes of a file; only of a table of text must its name be known, which ends with .csv or .tsv. Raises InvalidData."""
    return dataset_of(rows_of(content, name), held_out=False)


def read_rows(rows: Sequence[object]) -> Dataset:
    """Of rows at hand, as JSON has them; their lines are their numbers. Raises InvalidData."""
    return dataset_of([Row.checked(number, row) for number, row in enumerate(rows, start=1)], held_out=False)


def _content(path: Path) -> bytes | None:
    """None if there is no such file."""
    try:
        if not path.exists():
            return None
        if path.is_dir():
            raise InvalidRequest(f"{path} is a folder: give a file in it", param="data")
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror or error}", param="data") from error
