"""The files of a job, which all lie in one folder: this module alone names them.

<data_dir>/jobs/<id>/input.jsonl           its examples, one a line: written by the gateway before the job exists
<data_dir>/jobs/<id>/decisions.jsonl       one PromptDecided a line: appended by the trainer, read by the gateway
<data_dir>/jobs/<id>/report.json           a Report: replaced by the trainer, read by the gateway
<data_dir>/jobs/<id>/round-K/OBJECTIVE/    a training run (sipo.training); round 0 is the first alignment
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ARTIFACTS: Mapping[str, str] = {"decisions": "decisions.jsonl", "report": "report.json"}
"""What a job leaves for its caller: file by name, relative to the job's folder."""


@dataclass(frozen=True)
class JobFiles:
    folder: Path

    @property
    def input(self) -> Path:
        return self.folder / "input.jsonl"

    @property
    def decisions(self) -> Path:
        return self.folder / ARTIFACTS["decisions"]

    @property
    def report(self) -> Path:
        return self.folder / ARTIFACTS["report"]

    def training_run(self, round_: int, objective: str) -> Path:
        return self.folder / f"round-{round_}" / objective
