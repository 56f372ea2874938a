"""The folder of one training run: this module alone names its files.

run.yaml           a TrainRun, and
pairs.jsonl        a TrainingPair a line: what the run is made from
adapter/           a plain PEFT adapter, with loss.png and README.md (sipo.training.records)
history.jsonl      the trainer's log
metrics.json       TrainMetrics, written last: a folder that has it is finished
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from sipo.errors import InvalidRequest
from sipo.files import sync, write_atomically
from sipo.training.data import TrainingPair
from sipo.training.settings import TrainMetrics, TrainRun

RUN, PAIRS, METRICS = "run.yaml", "pairs.jsonl", "metrics.json"
ADAPTER = "adapter"
HISTORY, CURVE, CARD = "history.jsonl", "loss.png", "README.md"


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
        """False also for a folder of something else."""
        return self._says(run, _lines(pairs))

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


def read_run(path: Path) -> TrainRun:
    try:
        return TrainRun.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidRequest(f"{path} is no training run: {error}") from error


def data_sha256(folders: Iterable[RunFolder]) -> str:
    """Of their pairs, one file after the other."""
    return hashlib.sha256(b"".join(folder.pairs_file.read_bytes() for folder in folders)).hexdigest()


def _write(folder: Path, run: TrainRun, lines: str) -> None:
    write_atomically(folder / RUN, yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    write_atomically(folder / PAIRS, lines)


def _lines(pairs: Iterable[TrainingPair]) -> str:
    return "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
