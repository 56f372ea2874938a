"""What a finished step came to: result.json in its folder, written last."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from sipo.files import sync, write_atomically
from sipo.record import Record

RESULT, SECONDS = "result.json", "seconds.json"


class Tokens(Record):
    """What a step computed. Each counts in every model that reads or writes it."""

    generated: int = 0
    scored: int = Field(default=0, description="prompts and responses, read for their log-probabilities")
    trained: int = Field(default=0, description="prompts and responses of all pairs, in all epochs")


class Result(Record):
    stage: str
    kind: str
    seed: int | None
    key: str
    seconds: float = Field(description="over all the times that it was stopped; those that ended by SIGKILL are not counted")
    parts: dict[str, float] = Field(default={}, description="seconds of what it consists of, such as a job's states")
    tokens: Tokens
    policy_set: str | None = Field(default=None, description="in the step's own store")


def read_result(folder: Path) -> Result | None:
    path = folder / RESULT
    return Result.model_validate_json(path.read_bytes()) if path.is_file() else None


def write_result(folder: Path, result: Result) -> None:
    write_atomically(folder / RESULT, result.model_dump_json(indent=1))
    sync(folder)


@contextmanager
def timed(folder: Path) -> Iterator[None]:
    """Adds what it takes to the folder's seconds."""
    began = time.monotonic()
    try:
        yield
    finally:
        write_atomically(folder / SECONDS, json.dumps(seconds(folder) + time.monotonic() - began))


def seconds(folder: Path) -> float:
    path = folder / SECONDS
    return float(json.loads(path.read_text())) if path.is_file() else 0.0
