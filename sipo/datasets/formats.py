"""From rows to examples: our schema, BeaverTails / PKU-SafeRLHF, and HelpSteer, told apart by their columns.

To add a format: a function from numbered rows to a Reading, and its telling columns in `examples_of`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from sipo.errors import InvalidData
from sipo.preferences import Example

Row = Mapping[str, Any]

SAFETY_LABELS = {"better_response_id": "helpful", "safer_response_id": "harmless"}
"""Columns of BeaverTails and PKU-SafeRLHF, and the objectives we read them as."""

HELPSTEER_SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

OUR_SCHEMA = 'prompt, response_0, response_1 and labels, such as {"helpful": 1, "harmless": 0}'


@dataclass(frozen=True)
class Reading:
    """What a source held. `left_out` counts what became no example, by reason."""

    format: str
    examples: list[Example]
    left_out: dict[str, int] = field(default_factory=dict)


def examples_of(rows: Iterable[tuple[int, Row]]) -> Reading:
    """All examples of (line, row) pairs; the first row's columns tell the format. Raises InvalidData."""
    numbered = list(rows)
    if not numbered:
        raise InvalidData(f"the data set is empty: give at least one row with {OUR_SCHEMA}")
    line, first = numbered[0]
    if "labels" in first:
        return Reading("sipo", [_example(line, row) for line, row in numbered])
    if first.keys() & SAFETY_LABELS.keys():
        return Reading("safe-rlhf", [_from_safe_rlhf(line, row) for line, row in numbered])
    if "response" in first and first.keys() & set(HELPSTEER_SCORES):
        return _from_helpsteer(numbered)
    raise InvalidData(
        f"the columns {', '.join(map(repr, first)) or '(none)'} belong to no format known here: a row needs {OUR_SCHEMA}; or the "
        f"columns of PKU-SafeRLHF (prompt, response_0, response_1, {', '.join(SAFETY_LABELS)}); or those of HelpSteer (prompt, "
        f"response and scores: {', '.join(HELPSTEER_SCORES)})",
        line=line,
    )


def _example(line: int, row: Row) -> Example:
    labels = row.get("labels")
    if isinstance(labels, Mapping):
        # Columnar files give every row the same keys: a null is a label that is absent.
        row = {**row, "labels": {name: label for name, label in labels.items() if label is not None}}
    try:
        return Example.model_validate(row)
    except ValidationError as error:
        raise InvalidData(_explain(error), line=line) from error


def _explain(error: ValidationError) -> str:
    """The first fault of an example, and what would be right."""
    fault = error.errors()[0]
    name, *inner = (str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"`{name}` is missing: a row needs {OUR_SCHEMA}"
    if name != "labels":
        return f"`{name}` is {_short(fault['input'])}: it must be text" + (", not empty" if name == "prompt" else "")
    if not inner:
        return f'`labels` is {_short(fault["input"])}: name at least one objective, such as {{"helpful": 1}}'
    if inner[-1] == "[key]":
        return f"the objective {_short(fault['input'])} has no usable name: a letter, then letters, digits, - and _ (64 at most)"
    return f"the label of {inner[0]!r} is {_short(fault['input'])}: it must be 0 (response_0 is better) or 1 (response_1 is better)"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _from_safe_rlhf(line: int, row: Row) -> Example:
    """Response ids are labels already; a column that is absent or null leaves its objective unlabelled."""
    labels = {objective: row.get(column) for column, objective in SAFETY_LABELS.items()}
    return _example(line, {**row, "labels": labels})


def _from_helpsteer(rows: Iterable[tuple[int, Row]]) -> Reading:
    """Every two responses to one prompt become an example: for each score the higher one is better, equal ones give no label."""
    by_prompt: dict[str, list[Row]] = {}
    for line, row in rows:
        _check_scored(line, row)
        by_prompt.setdefault(row["prompt"], []).append(row)
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    for prompt, answers in by_prompt.items():
        if len(answers) == 1:
            left_out["a prompt with one response only"] += 1
        for first, second in combinations(answers, 2):
            labels = {
                name: int(second[name] > first[name])
                for name in HELPSTEER_SCORES
                if first.get(name) is not None and second.get(name) is not None and first[name] != second[name]
            }
            if labels:
                pair = {"prompt": prompt, "response_0": first["response"], "response_1": second["response"], "labels": labels}
                examples.append(Example.model_validate(pair))
            else:
                left_out["a pair with equal scores throughout"] += 1
    if not examples:
        raise InvalidData("no two responses to the same prompt differ in a score: nothing tells which one is better")
    return Reading("helpsteer", examples, dict(left_out))


def _check_scored(line: int, row: Row) -> None:
    for name in ("prompt", "response"):
        if not isinstance(row.get(name), str) or (name == "prompt" and not row[name]):
            raise InvalidData(f"`{name}` is {_short(row.get(name))}: it must be text", line=line)
    for name in HELPSTEER_SCORES:
        score = row.get(name)
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score)):
            raise InvalidData(f"`{name}` is {_short(score)}: a score must be a number, or absent", line=line)
