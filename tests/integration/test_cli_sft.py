"""`sipo sft` with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.models import model_sha256
from sipo.training.presets import read_preset

ROWS = [{"prompt": f"q{i}", "response_0": "yes", "response_1": f"no {i}", "labels": {"warm": i % 2}} for i in range(4)]
QUICK = {"lora_rank": 4, "batch_size": 8, "micro_batch_size": 8}


@pytest.fixture
def environment(data_dir: Path, tiny_base: Path, tmp_path: Path) -> dict[str, str | None]:
    values = {"SIPO_DATA_DIR": data_dir, "SIPO_CACHE_DIR": tmp_path / "cache", "SIPO_MODEL": tiny_base, "COLUMNS": 200}
    return {name: str(value) for name, value in values.items()} | {"CUDA_VISIBLE_DEVICES": None}


def sft(
    tmp_path: Path,
    environment: dict[str, str | None],
    rows: Sequence[Mapping[str, object]] = ROWS,
    given: Mapping[str, object] = QUICK,
) -> Result:
    data, settings = tmp_path / "data.jsonl", tmp_path / "quick.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings.write_text(yaml.safe_dump(dict(given)))
    return CliRunner().invoke(
        app, ["sft", str(data), "--out", str(tmp_path / "tuned"), "--settings", str(settings)], env=environment
    )


def test_the_new_base_is_a_model_with_its_own_hash_and_recipe(
    environment: dict[str, str | None], tiny_base: Path, tmp_path: Path
) -> None:
    done = sft(tmp_path, environment)
    assert done.exit_code == 0, done.output
    recipe = json.loads((tmp_path / "tuned" / "recipe.json").read_text())
    assert (recipe["rows"], recipe["steps"]) == (8, 3)
    settings = read_preset("small").sft.model_dump() | QUICK
    assert recipe["settings"].items() <= settings.items()
    assert settings.keys() - recipe["settings"].keys() == {"beta", "alpha", "divergence", "divergence_alpha", "max_pairs"}
    assert recipe["sha256"] == model_sha256(tmp_path / "tuned", tmp_path / "cache") != model_sha256(tiny_base, tmp_path / "cache")
    assert "the new base is " in done.output
    assert "training 1/3, loss " in done.output
    again = sft(tmp_path, environment)
    assert (again.exit_code, "is there already: name another folder" in again.output) == (1, True)


def test_the_presets_are_the_papers() -> None:
    presets = {name: read_preset(name).sft for name in ("small", "beavertails", "helpsteer")}
    assert {name: (one.epochs, one.learning_rate, one.batch_size) for name, one in presets.items()} == {
        "small": (3, 1e-4, 2),
        "beavertails": (3, 1e-4, 2),
        "helpsteer": (2, 1e-5, 2),
    }


def test_pairs_are_responses_too_and_what_is_left_out_is_told_first(environment: dict[str, str | None], tmp_path: Path) -> None:
    pairs = [{"prompt": "q", "chosen": "a", "rejected": ""}, {"prompt": "q" * 300, "chosen": "b", "rejected": "c" * 300}]
    done = sft(tmp_path, environment, [*pairs, {"prompt": "x", "chosen": "d" * 300, "rejected": "e"}])
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[:3] == [
        "1 of 3 prompts left out: longer than max_prompt_tokens = 256",
        "1 response cut: longer than max_response_tokens = 256",
        "1 response left out: empty",
    ]
    recipe = json.loads((tmp_path / "tuned" / "recipe.json").read_text())
    assert (recipe["rows"], recipe["prompts_too_long"]) == (3, 1)


def test_settings_of_training_on_pairs_are_refused(environment: dict[str, str | None], tmp_path: Path) -> None:
    refused = sft(tmp_path, environment, given={**QUICK, "max_pairs": 9, "beta": 0.2})
    assert (refused.exit_code, "beta, max_pairs: fine-tuning has no pairs" in refused.output) == (2, True)
    assert not (tmp_path / "tuned").exists()
