"""Two responses a row, and a label for each objective: our own schema, and PKU-SafeRLHF's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal

from sipo.datasets.rows import Row, short
from sipo.datasets.turns import prompt_in
from sipo.errors import InvalidRequest
from sipo.preferences import Example, check_objectives

SAFETY_LABELS = {"better_response_id": "helpful", "safer_response_id": "harmless"}
"""Columns of PKU-SafeRLHF, and the objectives that we read them as."""


def read_labelled(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    for row in rows:
        yield row.line, _example(row, labels_in(row, row.get("labels")))


def read_safe_rlhf(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    """Response ids are labels already; a column that is absent or null leaves its objective unlabelled."""
    for row in rows:
        labels = {name: row.get(column) for column, name in SAFETY_LABELS.items()}
        if all(label is None for label in labels.values()):
            raise row.wrong(
                f"neither {' nor '.join(f'`{column}`' for column in SAFETY_LABELS)} is there: one at least must be 0 or 1"
            )
        yield row.line, _example(row, labels_in(row, labels))


def labels_in(row: Row, labels: object) -> dict[str, Literal[0, 1]]:
    """At least one. Files with columns give every row the same keys: a null is a label that is absent."""
    present = {str(name): label for name, label in labels.items() if label is not None} if isinstance(labels, Mapping) else {}
    if not present:
        raise row.wrong(f'`labels` is {short(labels)}: name at least one objective, such as {{"helpful": 1}}')
    for name, label in present.items():
        check_name(row, name)
        if label not in (0, 1):
            raise row.wrong(
                f"the label of {name!r} is {short(label)}: it must be 0 (response_0 is better) or 1 (response_1 is better)"
            )
    return {name: 1 if label else 0 for name, label in present.items()}


def check_name(row: Row, objective: str) -> None:
    try:
        check_objectives([objective])
    except InvalidRequest as error:
        raise row.wrong(error.message) from error


def _example(row: Row, labels: dict[str, Literal[0, 1]]) -> Example:
    return Example(prompt=prompt_in(row), response_0=row.text("response_0"), response_1=row.text("response_1"), labels=labels)
