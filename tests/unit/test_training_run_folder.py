"""A training run's folder: whole or not there, whatever happens while it is prepared, and finished only when that is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from sipo.errors import IncompatiblePolicy, InvalidRequest, NotFound
from sipo.policies import adapter_sha256
from sipo.prompts import PromptFormat
from sipo.training.data import TrainingPair
from sipo.training.run_folder import RunFolder, data_sha256, reference_of
from sipo.training.settings import Measure, TrainMetrics, TrainRun, TrainSettings

CONVERSATION = [{"role": "system", "content": "Grüße!"}, {"role": "user", "content": "schön?"}]
PAIRS = [
    TrainingPair(prompt="schön?", chosen="ja", rejected="nein", chosen_token_ids=[1, 2]),
    TrainingPair(prompt=CONVERSATION, chosen="ja", rejected="nein"),
]
RUN = TrainRun(
    objective="warm",
    base=Path("/models/tiny"),
    base_name="tiny",
    prompt_format=PromptFormat(kind="raw", template="{prompt}\n"),
    settings=TrainSettings(learning_rate=5e-6),
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "round-1" / "warm")


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


def test_what_a_run_is_made_from_reads_back(folder: RunFolder) -> None:
    folder.prepare(RUN, PAIRS)
    assert (folder.run(), folder.pairs()) == (RUN, PAIRS)
    assert folder.is_made_from(RUN, PAIRS)
    assert not folder.is_made_from(RUN, [])
    assert not folder.is_made_from(RUN.model_copy(update={"objective": "concise"}), PAIRS)
    assert folder.finished() is None


def test_a_reference_is_known_by_its_hash_and_a_set_has_one(folder: RunFolder, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("here", "there")]
    for place in places:
        place.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (place / name).write_text("same")
    sha256 = adapter_sha256(places[0])
    here, there = (RUN.model_copy(update={"reference": place, "reference_sha256": sha256}) for place in places)
    folder.prepare(here, PAIRS)
    assert folder.is_made_from(there, PAIRS) and not folder.is_made_from(RUN, PAIRS)
    assert not folder.is_made_from(here.model_copy(update={"reference_sha256": "other"}), PAIRS)
    folder.prepare(there, PAIRS)
    assert folder.run() == there
    assert (reference_of(here, there), reference_of(RUN, RUN)) == (places[0], None)
    with pytest.raises(InvalidRequest, match="lie on one reference, and these runs have different ones"):
        reference_of(here, RUN)
    (places[1] / "adapter_model.safetensors").write_text("trained again")
    with pytest.raises(IncompatiblePolicy, match="is not the adapter any more that the training began with"):
        reference_of(there)
    (places[1] / "adapter_config.json").unlink()
    with pytest.raises(NotFound, match="is not there any more"):
        reference_of(there)


def test_a_run_of_before_there_were_references_has_the_base_for_it(folder: RunFolder) -> None:
    folder.prepare(RUN, PAIRS)
    written = yaml.safe_load(folder.run_file.read_text())
    del written["reference"], written["reference_sha256"]
    folder.run_file.write_text(yaml.safe_dump(written))
    assert folder.is_made_from(RUN, PAIRS)


def test_a_kill_at_any_moment_leaves_a_whole_folder_or_none(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = {"rename": os.rename, "replace": os.replace}
    left = 0

    def until_killed(name: str) -> Any:
        def move(*paths: Any) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            moves[name](*paths)

        return move

    for name in moves:
        monkeypatch.setattr(os, name, until_killed(name))
    for survived in range(3):
        left = survived
        with pytest.raises(Killed):
            folder.prepare(RUN, PAIRS)
        assert not folder.path.exists()
    left = 3
    folder.prepare(RUN, PAIRS)
    assert folder.is_made_from(RUN, PAIRS)
    assert [path.name for path in folder.path.parent.iterdir()] == ["warm"], "nothing is left beside it"
    assert {path.name for path in folder.path.iterdir()} == {"run.yaml", "pairs.jsonl"}


def test_a_folder_that_is_there_is_left_alone_or_told_where_things_are_now(folder: RunFolder) -> None:
    folder.prepare(RUN, PAIRS)
    checkpoint = folder.path / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    claimed = folder.run_file.stat().st_ino
    folder.prepare(RUN, PAIRS)
    assert folder.run_file.stat().st_ino == claimed, "a process that trains it keeps its lock"
    moved = RUN.model_copy(update={"base": Path("/elsewhere/tiny")})
    folder.prepare(moved, PAIRS)
    assert folder.run() == moved and checkpoint.is_dir()


def test_metrics_make_it_finished(folder: RunFolder) -> None:
    measure = Measure(loss=0.5, margin=0, accuracy=1)
    counts = dict.fromkeys(("pairs", "validation_pairs", "prompts_too_long", "identical", "responses_cut", "steps", "best_step"), 1)
    metrics = TrainMetrics(
        objective="warm", held_out=False, micro_batch_size=1, seconds=2, dtype="float32", before=measure, after=measure, **counts
    )
    folder.prepare(RUN, PAIRS)
    folder.finish(metrics)
    assert folder.finished() == metrics
    assert json.loads((folder.path / "metrics.json").read_text())["seconds"] == 2


def test_the_data_of_several_runs_have_one_hash_that_depends_on_their_order(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name) for name in ("concise", "warm")]
    for folder, pairs in zip(folders, ([], PAIRS), strict=True):
        folder.prepare(RUN, pairs)
    assert data_sha256(folders) == data_sha256(folders[1:]) != data_sha256([folders[1], folders[1]])
