"""Two responses a row, and how strongly one is preferred: HelpSteer2-Preference and HelpSteer3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sipo.conversation import Prompt
from sipo.datasets.rows import Row, short
from sipo.datasets.turns import marked_prompt_in, prompt_in
from sipo.preferences import Example

OBJECTIVE = "helpfulness"
STRONGEST = 3


def read_helpsteer2_preference(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    for row in rows:
        yield from _preferred(row, marked_prompt_in(row), ("response_1", "response_2"), "preference_strength", left_out)


def read_helpsteer3(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    for row in rows:
        yield from _preferred(row, prompt_in(row, "context"), ("response1", "response2"), "overall_preference", left_out)


def _preferred(
    row: Row, prompt: Prompt, responses: tuple[str, str], column: str, left_out: Counter[str]
) -> Iterator[tuple[int, Example]]:
    """A negative strength prefers the first response, a positive one the second."""
    first, second = (row.text(response) for response in responses)
    strength = row.number(column)
    if strength is None or abs(strength) > STRONGEST:
        raise row.wrong(f"`{column}` is {short(row.get(column))}: it must be from -{STRONGEST} to {STRONGEST}")
    if strength == 0:
        left_out["pairs of which neither response is preferred"] += 1
        return
    labels = {OBJECTIVE: 1 if strength > 0 else 0}
    yield row.line, Example(prompt=prompt, response_0=first, response_1=second, labels=labels)
