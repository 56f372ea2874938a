"""The folder of one evaluation: this module alone names its files.

plan.json               Plan.identity(): a folder belongs to one plan
prompts.jsonl           a TestPrompt a line
answers/METHOD.jsonl    an Answer a line, prompt by prompt, at each of the method's weights
scores/JUDGE.jsonl      a Scored a line
divergence/METHOD.jsonl a Divergence a line, where it was asked for
validation/             the base's answers to validation prompts, and their rewards, as a folder of its own
seconds.json            how long each stage took, over all the times that it was stopped
report.json             an EvaluationReport, written last, with the page and the pictures of sipo.evaluation.page
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from sipo.errors import Conflict, InvalidRequest
from sipo.evaluation.plan import Plan
from sipo.evaluation.report import EvaluationReport
from sipo.files import sync, write_atomically
from sipo.record import Record

PLAN, PROMPTS, SECONDS, REPORT = "plan.json", "prompts.jsonl", "seconds.json", "report.json"
ANSWERS, SCORES, DIVERGENCES = "answers", "scores", "divergence"
VALIDATION = "validation"

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class RowFile(Generic[R]):
    """Rows in a known order, of which an evaluation that was stopped leaves the first ones."""

    path: Path
    record: type[R]

    def read(self) -> list[R]:
        """The whole lines; a torn one at the end is as good as none. Raises InvalidRequest for a damaged file."""
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")
        try:
            return [self.record.model_validate_json(line) for line in lines]
        except ValidationError as error:
            raise InvalidRequest(f"{self.path} is damaged: remove it, and it is made again", param="out") from error

    def keep(self, rows: Sequence[R]) -> None:
        """Cuts the file behind these, its first rows."""
        if self.path.exists():
            os.truncate(self.path, len("".join(map(_line, rows)).encode()))

    def add(self, rows: Sequence[R]) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))


def _line(row: Record) -> str:
    return f"{row.model_dump_json()}\n"


@dataclass(frozen=True)
class EvaluationFolder:
    path: Path

    def rows(self, kind: str, name: str, record: type[R]) -> RowFile[R]:
        return RowFile(self.path / kind / f"{name}.jsonl", record)

    @property
    def validation(self) -> EvaluationFolder:
        return EvaluationFolder(self.path / VALIDATION)

    def prepare(self, plan: Plan) -> None:
        """Begins it, or finds what was begun. Raises InvalidRequest, with nothing touched, if that was another plan or none."""
        plan_file = self.path / PLAN
        if plan_file.exists():
            if differing := _differing(plan_file, plan):
                raise InvalidRequest(
                    f"{self.path} was begun with other {' and '.join(differing)}: evaluate in another folder", param="out"
                )
            return
        if self.path.exists() and any(not path.name.startswith(".") and path.name != PROMPTS for path in self.path.iterdir()):
            raise InvalidRequest(f"{self.path} holds other files: evaluate in a new one", param="out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / PROMPTS, "".join(map(_line, plan.prompts)))
        write_atomically(plan_file, plan.identity_text())
        sync(self.path)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Raises Conflict while another process evaluates here. The folder must be prepared."""
        with (self.path / PLAN).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(f"another process evaluates in {self.path} already: wait for it, or stop it") from error
            for kind in (ANSWERS, SCORES):
                (self.path / kind).mkdir(exist_ok=True)
            yield

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds what it takes to the stage's seconds."""
        began = time.monotonic()
        yield
        seconds = self.seconds()
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - began
        write_atomically(self.path / SECONDS, json.dumps(seconds, indent=1))

    def seconds(self) -> dict[str, float]:
        path = self.path / SECONDS
        return json.loads(path.read_text()) if path.exists() else {}

    def finish(self, report: EvaluationReport) -> None:
        write_atomically(self.path / REPORT, report.model_dump_json(indent=1))
        sync(self.path)


def _differing(plan_file: Path, plan: Plan) -> list[str]:
    """Which parts of the plan are not as the file says."""
    try:
        before = json.loads(plan_file.read_text(encoding="utf-8"))
    except ValueError:
        before = {}
    now = json.loads(plan.identity_text())
    return [part for part in now if not isinstance(before, dict) or before.get(part) != now[part]]
