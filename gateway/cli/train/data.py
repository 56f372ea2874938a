"""The file of `sipo train` and `sipo sft`."""

from __future__ import annotations

from gateway.cli.own_rows import read_rows_or_examples
from sipo.preferences import Example
from sipo.training.sources import Labelled, PairRow, Pairs


def read_data(data: str) -> Labelled | Pairs:
    """The first row's columns tell which. Raises InvalidData for the first wrong line, NotFound if there is no such file."""
    rows = read_rows_or_examples(data, PairRow, {"chosen", "rejected"}, "a pair needs prompt, chosen and rejected, each a text")
    pairs = [row for row in rows if not isinstance(row, Example)]
    return Pairs(pairs) if pairs else Labelled([row for row in rows if isinstance(row, Example)])
