"""What a caller asks of an evaluation, and the states that it goes through.

It is kept in Redis (services.common.contract.evaluation_store); its folder is one that `python -m sipo.evaluation` works in
(sipo.evaluation.task).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from services.common.contract.states import State
from sipo.errors import InvalidRequest
from sipo.preferences import ObjectiveName, Weights
from sipo.record import Record

FUNCTION = "python:"
"""How a judge is named that is an installed function. All others have a name of SIPO_EVALUATION_JUDGES."""
PAGE, REPORT = "index.html", "report.json"
_PICTURE = re.compile(r"[a-z0-9_-]{1,64}\.(png|svg)")


class EvaluationState(State):
    """queued → running → completed | failed | cancelled."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Judged(Record):
    """How answers are asked for and judged, whoever gives them."""

    judges: dict[ObjectiveName, str] = Field(
        min_length=2, description="by objective: python:NAME, a function that is installed, or a name of SIPO_EVALUATION_JUDGES"
    )
    weights: Annotated[int, Field(ge=2, le=64)] | Annotated[list[Weights], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="how many on an even grid of two objectives, or each; default as of `sipo evaluate`"
    )
    max_tokens: int = Field(default=128, ge=1, le=4096, description="of one answer")

    def weight_texts(self) -> list[str]:
        """As sipo.evaluation.plan reads them."""
        if self.weights is None or isinstance(self.weights, int):
            return [] if self.weights is None else [str(self.weights)]
        return [",".join(f"{name}={value!r}" for name, value in point.items()) for point in self.weights]


class EvaluationSpec(Judged):
    """The body of POST /v1/evaluations, its prompts aside."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        default=None, description="title of the page; default: the evaluation's id"
    )
    methods: list[str] = Field(
        min_length=1, max_length=32, description="base, or NAME=mod:SET, NAME=soup:SET, NAME=reference:SET, as in `sipo evaluate`"
    )
    max_prompts: int | None = Field(default=None, ge=2, description="the first so many; default: all")
    against: list[str] = Field(default=[], description="methods with which others are compared; default: each with all before it")
    seed: int = Field(default=0, ge=0, description="of the bootstrap; answers are greedy")


class RoundEvaluationSpec(Judged):
    """How a job's rounds are evaluated: the policies before and after, on prompts that the job does not train on."""

    max_prompts: int = Field(default=32, ge=2, description="the first so many of those held out")


def shown_files(front: Path) -> list[str]:
    """Of an evaluation's own folder: its page, its report and its pictures, by name."""
    return sorted(path.name for path in front.iterdir() if path.name in (PAGE, REPORT) or _PICTURE.fullmatch(path.name))


def judge_address(name: str, configured: Mapping[str, str]) -> str:
    """Of a judge that a caller named. Raises InvalidRequest for any other: an address of a caller's would have this system ask it,
    or load it."""
    if name.startswith(FUNCTION):
        return name
    if name not in configured:
        known = ", ".join(sorted(configured)) or "none"
        raise InvalidRequest(
            f"no judge {name!r}: give python:NAME, a function that is installed, or a name of SIPO_EVALUATION_JUDGES, which has "
            f"{known}",
            param="judges",
        )
    return configured[name]
