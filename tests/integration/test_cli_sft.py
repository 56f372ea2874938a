"""`sipo sft` with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.lora import load_adapter
from sipo.models import model_sha256
from sipo.policies import PolicyStore, adapter_sha256
from sipo.training.presets import read_preset
from tests.trainer import write_adapter

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
    *options: str,
) -> Result:
    data, settings = tmp_path / "data.jsonl", tmp_path / "quick.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings.write_text(yaml.safe_dump(dict(given)))
    return CliRunner().invoke(
        app, ["sft", str(data), "--out", str(tmp_path / "tuned"), "--settings", str(settings), *options], env=environment
    )


def test_the_new_base_is_a_model_with_its_own_hash_and_recipe(
    environment: dict[str, str | None], tiny_base: Path, tmp_path: Path
) -> None:
    done = sft(tmp_path, environment, ROWS, QUICK, "--merge")
    assert done.exit_code == 0, done.output
    recipe = json.loads((tmp_path / "tuned" / "recipe.json").read_text())
    assert (recipe["rows"], recipe["steps"]) == (8, 2)
    assert recipe["base"] == {"name": str(tiny_base), "sha256": model_sha256(tiny_base, tmp_path / "cache")}
    settings = read_preset("small").sft.model_dump() | QUICK
    assert recipe["settings"].items() <= settings.items()
    assert settings.keys() - recipe["settings"].keys() == {"beta", "alpha", "divergence", "divergence_alpha", "max_pairs"}
    assert recipe["sha256"] == model_sha256(tmp_path / "tuned", tmp_path / "cache") != model_sha256(tiny_base, tmp_path / "cache")
    assert "the new base is " in done.output
    assert "training 1/2, loss " in done.output
    again = sft(tmp_path, environment)
    assert (again.exit_code, "is there already: name another folder" in again.output) == (1, True)


def test_the_adapter_that_is_left_is_a_reference_for_policies(
    environment: dict[str, str | None], data_dir: Path, tmp_path: Path
) -> None:
    done = sft(tmp_path, environment)
    assert done.exit_code == 0, done.output
    assert f"align policies on it: --reference {tmp_path / 'tuned'}" in done.output
    policies = [f"{name}={write_adapter(tmp_path / name)}" for name in ("helpful", "harmless")]
    published = CliRunner().invoke(
        app, ["policies", "import", *policies, "--name", "mine", "--reference", str(tmp_path / "tuned")], env=environment
    )
    assert published.exit_code == 0, published.output
    policy_set = PolicyStore(data_dir / "policies").get("mine:1")
    assert policy_set.manifest.reference is not None and policy_set.reference_dir is not None
    assert policy_set.manifest.reference.sha256 == adapter_sha256(tmp_path / "tuned")
    assert "trained by supervised fine-tuning" in (policy_set.reference_dir / "README.md").read_text()
    shown = CliRunner().invoke(app, ["policies", "show", "mine:1"], env=environment)
    assert f"reference: {policy_set.reference_dir}" in shown.stdout

    soup = ["policies", "soup", "mine:1", "--weights", "helpful=0.25,harmless=0.75", "--out", str(tmp_path / "soup")]
    assert CliRunner().invoke(app, soup, env=environment).exit_code == 0
    module = "model.layers.1.self_attn.q_proj"
    deltas = {
        name: b @ a for name in ("helpful", "harmless", "tuned", "soup") for a, b in [load_adapter(tmp_path / name).modules[module]]
    }
    torch.testing.assert_close(deltas["soup"], 0.25 * deltas["helpful"] + 0.75 * deltas["harmless"] + deltas["tuned"])


def test_the_presets_are_the_papers() -> None:
    presets = {name: read_preset(name).sft for name in ("small", "beavertails", "helpsteer")}
    assert {name: (one.epochs, one.learning_rate, one.batch_size) for name, one in presets.items()} == {
        "small": (2, 3e-4, 8),
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
