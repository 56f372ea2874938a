"""`sipo sft` with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.models import model_sha256


@pytest.fixture
def environment(data_dir: Path, tiny_base: Path, tmp_path: Path) -> dict[str, str]:
    values = {"SIPO_DATA_DIR": data_dir, "SIPO_CACHE_DIR": tmp_path / "cache", "SIPO_MODEL": tiny_base, "COLUMNS": 200}
    return {name: str(value) for name, value in values.items()}


def sft(tmp_path: Path, environment: dict[str, str], rows: list[dict[str, object]]) -> Result:
    data, settings = tmp_path / "data.jsonl", tmp_path / "quick.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings.write_text(yaml.safe_dump({"epochs": 1, "learning_rate": 0.01, "lora_rank": 4, "batch_size": 4}))
    return CliRunner().invoke(
        app, ["sft", str(data), "--out", str(tmp_path / "tuned"), "--settings", str(settings)], env=environment
    )


def test_the_new_base_is_a_model_with_its_own_hash_and_recipe(environment: dict[str, str], tiny_base: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"q{i}", "response_0": "yes", "response_1": f"no {i}", "labels": {"warm": i % 2}} for i in range(4)
    ]
    done = sft(tmp_path, environment, rows)
    assert done.exit_code == 0, done.output
    recipe = json.loads((tmp_path / "tuned" / "recipe.json").read_text())
    assert (recipe["rows"], recipe["steps"], recipe["settings"]["lora_rank"]) == (8, 2, 4)
    assert recipe["sha256"] == model_sha256(tmp_path / "tuned", tmp_path / "cache") != model_sha256(tiny_base, tmp_path / "cache")
    assert "the new base is " in done.output
    assert "training 1/2, loss " in done.output
    again = sft(tmp_path, environment, rows)
    assert (again.exit_code, "is there already: name another folder" in again.output) == (1, True)


def test_pairs_are_refused(environment: dict[str, str], tmp_path: Path) -> None:
    refused = sft(tmp_path, environment, [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert (refused.exit_code, "takes labelled data" in refused.output) == (2, True)
