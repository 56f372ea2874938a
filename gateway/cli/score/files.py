"""What `sipo score` writes: scored rows, of which an interrupted run leaves the first ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from sipo.conversation import Prompt
from sipo.datasets import Answers
from sipo.errors import InvalidRequest
from sipo.preferences import ObjectiveName

LINE_START = b'{"policy_set":'
"""Of a ScoredRow: what does not begin so is no torn line of ours."""


class ScoredRow(BaseModel):
    """A line of the output: rewards by model for each response, or what is wrong with the row."""

    policy_set: str
    length_normalized: bool
    prompt: Prompt
    labels: dict[ObjectiveName, Literal[0, 1]] | None = None
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


def scored_before(out: Path, rows: Sequence[Answers], policy_set: str, length_normalized: bool, names: set[str]) -> list[ScoredRow]:
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
