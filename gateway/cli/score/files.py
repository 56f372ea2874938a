"""The files of `sipo score`: rows to be scored, and scored rows, of which an interrupted run leaves the first ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from gateway.cli.own_rows import read_rows_or_examples
from sipo.errors import InvalidRequest
from sipo.preferences import Example, ObjectiveName

LINE_START = b'{"policy_set":'
"""Of a ScoredRow: what does not begin so is no torn line of ours."""

Labels = dict[ObjectiveName, Literal[0, 1]]


class RowToScore(BaseModel):
    """A prompt and responses that ended by themselves; labels, as in Example, only where there are two."""

    prompt: str = Field(min_length=1)
    responses: list[str] = Field(min_length=1)
    labels: Labels | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.labels and len(self.responses) != 2:
            raise ValueError(f"labels compare two responses, here are {len(self.responses)}")
        return self


class ScoredRow(BaseModel):
    """A line of the output: rewards by model for each response, or what is wrong with the row."""

    policy_set: str
    length_normalized: bool
    prompt: str
    labels: Labels | None = None
    rewards: list[dict[str, float]] | None = None
    error: str | None = None


def check_out(out: Path | None, resume: bool) -> None:
    if out is None:
        if resume:
            raise InvalidRequest("--resume goes on with a file: name it with --out")
    elif not out.parent.is_dir():
        raise InvalidRequest(f"{out.parent} is no folder")
    elif out.exists() and not resume:
        raise InvalidRequest(f"{out} exists: name another file, or go on with it by --resume")


def read_rows(data: str) -> list[RowToScore]:
    """The rows of our own format or of a labelled one."""
    found = read_rows_or_examples(data, RowToScore, {"responses"}, "a row needs a prompt and responses, a list of texts")
    return [
        RowToScore(prompt=one.prompt, responses=[one.response_0, one.response_1], labels=one.labels)
        if isinstance(one, Example)
        else one[1]
        for one in found
    ]


def scored_before(
    out: Path, rows: Sequence[RowToScore], policy_set: str, length_normalized: bool, names: set[str]
) -> list[ScoredRow]:
    """The rows that an interrupted run left in `out`; a line that it could not finish is cut off. Raises InvalidRequest if they do
    not belong to this run."""
    *lines, torn = out.read_bytes().split(b"\n")
    try:
        scored = [ScoredRow.model_validate_json(line) for line in lines]
    except ValidationError as error:
        raise InvalidRequest(f"{out} was not written by `sipo score`: name another file") from error
    if not LINE_START.startswith(torn[: len(LINE_START)]):
        raise InvalidRequest(f"{out} does not end as `sipo score` writes: name another file")
    same = len(scored) <= len(rows) and all(
        (before.policy_set, before.length_normalized, before.prompt, before.labels)
        == (policy_set, length_normalized, row.prompt, row.labels)
        and (before.rewards is None or [one.keys() for one in before.rewards] == [names] * len(row.responses))
        for before, row in zip(scored, rows, strict=False)
    )
    if not same:
        raise InvalidRequest(f"{out} holds the rewards of other rows, policies, weights or options: name another file")
    os.truncate(out, out.stat().st_size - len(torn))
    return scored
