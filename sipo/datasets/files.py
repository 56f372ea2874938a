"""From the bytes of a file to rows: JSON lines, a JSON array, Parquet, CSV, gzipped or not.

The content tells which one it is; only tables of text are told by the name's ending.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from sipo.datasets.rows import MAX_DEPTH, Row
from sipo.datasets.tables import table_rows
from sipo.errors import InvalidData

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".gz")
"""What has one of them is a file's name, and no data set's on the hub."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def rows_of(content: bytes, name: str = "") -> Iterator[Row]:
    """Raises InvalidData for the first thing that cannot be read."""
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidData(f"not a whole gzip file ({error})", param="data") from error
    if content.startswith(b"PAR1"):
        return _parquet_rows(content)
    text = _text(content)
    ending = name.lower().removesuffix(".gz")[-4:]
    if ending in _DELIMITERS:
        return table_rows(text, _DELIMITERS[ending])
    return _array_rows(text) if text.lstrip(" \t\r\n").startswith("[") else _json_lines(text)


def _text(content: bytes) -> str:
    if content.startswith(b"version https://git-lfs"):
        raise InvalidData("a git-lfs pointer and not the data itself: fetch that with `git lfs pull`", param="data")
    encoding = next((name for mark, name in _OTHER_ENCODINGS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:4]:
        encoding = "UTF-16 or UTF-32"
    if encoding:
        raise InvalidData(f"not UTF-8 text ({encoding}): save it as UTF-8", param="data")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise InvalidData(f"not UTF-8 text ({error.reason} at byte {column}): save it as UTF-8", line=line) from error


def _json_lines(text: str) -> Iterator[Row]:
    """Blank lines are passed over, as are the byte order marks that joining files leaves inside."""
    for line, row in enumerate(text.split("\n"), start=1):
        if row.strip("\ufeff \t\r"):
            yield Row.checked(line, _json(row.lstrip("\ufeff"), line, "write one object a line, or all of them in an array"))


def _array_rows(text: str) -> Iterator[Row]:
    rows = _json(text, 1, "an array of objects must be all that the file holds")
    return (Row.checked(number, row) for number, row in enumerate(rows, start=1))


def _json(text: str, line: int, advice: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fault = f"not JSON ({error.msg} at column {error.colno}): {advice}"
        raise InvalidData(fault, line=line + error.lineno - 1) from error
    except RecursionError as error:
        raise InvalidData(f"nested more than {MAX_DEPTH} deep: no format known here is", line=line) from error
    except ValueError as error:  # a whole number of thousands of digits
        raise InvalidData(f"a number that cannot be read ({error})", line=line) from error


def _parquet_rows(content: bytes) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist(maps_as_pydicts="strict")
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason, _, _ = str(error).partition("\n")
        raise InvalidData(f"not a readable Parquet file ({reason})", param="data") from error
    return (Row.checked(number, row) for number, row in enumerate(rows, start=1))
