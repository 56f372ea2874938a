"""From a file, an upload or the hub to numbered rows. A line counts from 1; where there are no lines, the row does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from sipo.datasets.formats import Reading, Row, examples_of
from sipo.errors import InvalidData, NotFound
from sipo.preferences import Example

FILE_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def read_examples(source: str | Path) -> list[Example]:
    """The examples of a file (one of FILE_ENDINGS) or a hub name; "NAME:SPLIT" for a split other than train.

    Raises InvalidData for the first wrong line, NotFound if there is no such source.
    """
    return read_source(source).examples


def read_lines(lines: bytes | Iterable[bytes | str]) -> list[Example]:
    """The examples of JSONL that is already at hand, such as an upload. Raises InvalidData."""
    return examples_of(_json_lines(lines.split(b"\n") if isinstance(lines, bytes) else lines)).examples


def read_source(source: str | Path) -> Reading:
    """As read_examples, with the format that was recognised and the count of what was left out."""
    path = Path(source).expanduser()
    if not path.name.endswith(FILE_ENDINGS):
        return examples_of(enumerate(_hub_rows(str(source)), start=1))
    if not path.is_file():
        raise NotFound(f"there is no file {path}", param="data")
    if path.suffix == ".parquet":
        return examples_of(enumerate(_parquet_rows(path), start=1))
    content = _content(path)
    if path.name.removesuffix(".gz").endswith(".json") and content.lstrip().startswith(b"["):
        return examples_of(_json_array(content))
    return examples_of(_json_lines(content.split(b"\n")))


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise InvalidData(f"{path} is no whole gzip file ({error})", param="data") from error


def _json_lines(lines: Iterable[bytes | str]) -> Iterator[tuple[int, Row]]:
    """Blank lines are passed over."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, _object(json.loads(line), number)
            except UnicodeDecodeError as error:
                raise InvalidData(f"not UTF-8 text ({error.reason} at byte {error.start})", line=number) from error
            except json.JSONDecodeError as error:
                raise InvalidData(
                    f"not JSON ({error.msg} at column {error.colno}): write one object a line", line=number
                ) from error


def _json_array(content: bytes) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(content)
    except UnicodeDecodeError as error:
        raise InvalidData(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise InvalidData(f"not JSON ({error.msg} at column {error.colno})", line=error.lineno) from error
    return ((number, _object(row, number)) for number, row in enumerate(rows, start=1))


def _object(row: object, number: int) -> Row:
    if not isinstance(row, dict):
        raise InvalidData(f"a JSON {type(row).__name__}: each row must be an object with named columns", line=number)
    return row


def _parquet_rows(path: Path) -> Iterable[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InvalidData(f"{path} is no readable Parquet file ({error})", param="data") from error
    return rows


def _hub_rows(name: str) -> Iterable[Row]:
    import datasets

    name, _, split = name.partition(":")
    try:
        rows: Iterable[Row] = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise NotFound(
            f"no data set {name!r}: give a file ({', '.join(FILE_ENDINGS)}), or a hub name that this machine can reach ({error})",
            param="data",
        ) from error
    return rows
