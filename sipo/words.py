"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """`1 row`, `2 rows`: for words whose plural is an s."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def share(count: int, of: int, thing: str) -> str:
    """`3 of 12 rows`, `1 of 1 row`."""
    return f"{count} of {counted(of, thing)}"
