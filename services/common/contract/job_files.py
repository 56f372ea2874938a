"""The files of a job, which all lie in one folder: this module alone names them.

<data_dir>/jobs/<id>/input.jsonl           its examples, one a line: written by the gateway before the job exists
<data_dir>/jobs/<id>/held_out.jsonl        prompts of its evaluation, if it asks for one (sipo.evaluation.task)
<data_dir>/jobs/<id>/decisions.jsonl       one PromptDecided a line: appended by the trainer, read by the gateway
<data_dir>/jobs/<id>/report.json           a Report: replaced by the trainer, read by the gateway
<data_dir>/jobs/<id>/report.html           the same for people, with curves: likewise
<data_dir>/jobs/<id>/round-K/OBJECTIVE/    a training run (sipo.training); round 0 is the first alignment
<data_dir>/jobs/<id>/round-0/_sft/         the fine-tuning before it, if the job has one: no objective can be called so
<data_dir>/jobs/<id>/evaluation-K/         the evaluation of round K (sipo.evaluation.task), and outcome.json, a RoundEvaluation
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ARTIFACTS: Mapping[str, str] = {"decisions": "decisions.jsonl", "report": "report.json"}
"""What a job leaves for its caller: file by name, relative to the job's folder."""
PAGE = "report.html"


@dataclass(frozen=True)
class JobFiles:
    folder: Path

    @property
    def input(self) -> Path:
        return self.folder / "input.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.jsonl"

    @property
    def decisions(self) -> Path:
        return self.folder / ARTIFACTS["decisions"]

    @property
    def report(self) -> Path:
        return self.folder / ARTIFACTS["report"]

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    def training_run(self, round_: int, objective: str) -> Path:
        return self.training_runs(round_) / objective

    def training_runs(self, round_: int) -> Path:
        """Those of all objectives."""
        return self.folder / f"round-{round_}"

    @property
    def fine_tuning(self) -> Path:
        return self.training_run(0, "_sft")

    def evaluation(self, round_: int) -> Path:
        return self.folder / f"evaluation-{round_}"

    def evaluation_outcome(self, round_: int) -> Path:
        return self.evaluation(round_) / "outcome.json"

    def artifacts(self) -> dict[str, str]:
        """What there is for the caller when a round has ended."""
        pages = {path.parts[-3]: str(path.relative_to(self.folder)) for path in self.folder.glob("evaluation-*/front/index.html")}
        page = {"page": PAGE} if self.page.exists() else {}
        return {**ARTIFACTS, **page, **dict(sorted(pages.items()))}
