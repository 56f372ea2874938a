"""The folder of one training run: this module alone names its files.

run.yaml           a TrainRun, and
pairs.jsonl        a TrainingPair a line: what the run is made from
adapter/           a plain PEFT adapter, with loss.png and README.md (sipo.training.records)
history.jsonl      the trainer's log
metrics.json       TrainMetrics, written last: a folder that has it is finished

Of a job's supervised fine-tuning:

run.yaml           an SftRun, and
answers.jsonl      an Answers a line: what the run is made from
adapter/           a plain PEFT adapter with its records (sipo.training.sft); there, the folder is finished
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, RootModel, ValidationError

from sipo.datasets import Answers
from sipo.errors import IncompatiblePolicy, InvalidRequest, NotFound
from sipo.files import sync, write_atomically
from sipo.policies import adapter_sha256
from sipo.training.data import TrainingPair
from sipo.training.settings import SftMetrics, SftRun, TrainMetrics, TrainRun

RUN, PAIRS, ANSWERS, METRICS = "run.yaml", "pairs.jsonl", "answers.jsonl", "metrics.json"
ADAPTER = "adapter"
RECIPE = "recipe.json"
"""Of a fine-tuning, beside its weights: what it was made from, and what it came to."""
HISTORY, CURVE, CARD = "history.jsonl", "loss.png", "README.md"

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / RUN

    @property
    def pairs_file(self) -> Path:
        return self.path / PAIRS

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    def prepare(self, run: TrainRun, pairs: Iterable[TrainingPair]) -> None:
        """Writes what the run is made from. Whenever this is killed, the folder is there whole or not at all.

        One that is there keeps what was trained in it; its files are written anew if they say something else, as the folders that
        they name may have moved.
        """
        lines = _lines(pairs)
        if self._says(run, lines):
            return
        if self.path.exists():
            _write(self.path, run, lines)
            return
        aside = self.path.with_name(f".{self.path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(aside, run, lines)
        aside.rename(self.path)

    def is_made_from(self, run: TrainRun, pairs: Iterable[TrainingPair]) -> bool:
        """False also for a folder of something else. A reference is known by its hash: where it lies does not matter."""
        try:
            there = self.run()
        except InvalidRequest:
            return False
        return self._says(run.model_copy(update={"reference": there.reference}), _lines(pairs))

    def run(self) -> TrainRun:
        return read_run(self.run_file)

    def pairs(self) -> list[TrainingPair]:
        with self.pairs_file.open() as file:
            return [json.loads(line) for line in file]

    def finish(self, metrics: TrainMetrics) -> None:
        """To be called last: everything else is on disk already."""
        write_atomically(self.path / METRICS, metrics.model_dump_json(indent=1))
        sync(self.path)

    def finished(self) -> TrainMetrics | None:
        """None if it is not."""
        path = self.path / METRICS
        return TrainMetrics.model_validate_json(path.read_text()) if path.exists() else None

    def _says(self, run: TrainRun, lines: str) -> bool:
        try:
            return self.run() == run and self.pairs_file.read_text() == lines
        except (InvalidRequest, OSError):
            return False


@dataclass(frozen=True)
class SftFolder:
    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / RUN

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    def prepare(self, run: SftRun, answered: Iterable[Answers]) -> None:
        """Writes what the run is made from, run.yaml last."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / ANSWERS, "".join(f"{row.model_dump_json()}\n" for row in answered))
        write_atomically(self.run_file, _yaml(run))

    def answers(self) -> list[Answers]:
        with (self.path / ANSWERS).open() as file:
            return [Answers.model_validate_json(line) for line in file]

    def finished(self) -> SftMetrics | None:
        """None if it is not."""
        path = self.adapter / RECIPE
        if not path.exists():
            return None
        recipe = json.loads(path.read_text())
        return SftMetrics.model_validate({name: recipe[name] for name in SftMetrics.model_fields})


def read_run(path: Path) -> TrainRun:
    return _read(path, TrainRun)


def read_any_run(path: Path) -> TrainRun | SftRun:
    return _read(path, RootModel[TrainRun | SftRun]).root


def reference_of(*runs: TrainRun) -> Path | None:
    """The folder of the adapter that makes the reference of these runs' policies; None: their base itself.

    Raises InvalidRequest for runs of different references, IncompatiblePolicy if the adapter is another one by now.
    """
    if len({run.reference_sha256 for run in runs}) > 1:
        raise InvalidRequest(
            "the policies of one set lie on one reference, and these runs have different ones: train them anew on one"
        )
    run = runs[0]
    if run.reference is None:
        return None
    try:
        found = adapter_sha256(run.reference)
    except OSError as error:
        raise NotFound(f"the reference's adapter {run.reference} is not there any more: {error}") from error
    if found != run.reference_sha256:
        raise IncompatiblePolicy(f"{run.reference} is not the adapter any more that the training began with: begin another one")
    return run.reference


def _read(path: Path, kind: type[M]) -> M:
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidRequest(f"{path} is no training run: {error}") from error


def data_sha256(folders: Iterable[RunFolder]) -> str:
    """Of their pairs, one file after the other."""
    return hashlib.sha256(b"".join(folder.pairs_file.read_bytes() for folder in folders)).hexdigest()


def _write(folder: Path, run: TrainRun, lines: str) -> None:
    write_atomically(folder / RUN, _yaml(run))
    write_atomically(folder / PAIRS, lines)


def _yaml(run: TrainRun | SftRun) -> str:
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _lines(pairs: Iterable[TrainingPair]) -> str:
    return "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
