"""`sipo train reward` with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.evaluation.reward_models import open_reward_model
from sipo.training.reward_models import RewardRecipe

ROWS = [
    {"prompt": f"q{i}", "response_0": "oak " * (6 + i % 3), "response_1": "elm", "labels": {"long": 0, "short": 1}}
    for i in range(44)
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["response_0"], "rejected": row["response_1"]} for row in ROWS[:8]]
QUICK = {"lora_rank": 4, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 0.02}


@pytest.fixture
def environment(data_dir: Path, tiny_base: Path, tmp_path: Path) -> dict[str, str | None]:
    values = {"SIPO_DATA_DIR": data_dir, "SIPO_CACHE_DIR": tmp_path / "cache", "SIPO_MODEL": tiny_base, "COLUMNS": 200}
    return {name: str(value) for name, value in values.items()} | {"CUDA_VISIBLE_DEVICES": None}


def train_reward(
    tmp_path: Path,
    environment: dict[str, str | None],
    rows: Sequence[Mapping[str, object]],
    *options: str,
    source: str = "{}",
    given: Mapping[str, object] = QUICK,
) -> Result:
    data, settings = tmp_path / "data.jsonl", tmp_path / "quick.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings.write_text(yaml.safe_dump(dict(given)))
    command = ["train", "reward", source.format(data), "--settings", str(settings), *options]
    return CliRunner().invoke(app, command, env=environment)


@pytest.mark.slow
def test_one_objective_of_labelled_rows_becomes_a_judge(environment: dict[str, str | None], data_dir: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "prompt": "held out", "split": "test"}]
    done = train_reward(tmp_path, environment, rows, "--objective", "long")
    assert done.exit_code == 0, done.output
    assert "held_out" not in done.stderr and "rows whose `split` holds them out of training (1)" in done.stderr
    assert (
        "long: accuracy 1.000 on 5 pairs held out; before 0.500, and of who always prefers the longer response 1.000" in done.stdout
    )
    assert "training 1/5, loss " in done.stdout
    (folder,) = (data_dir / "reward-models").iterdir()
    assert f"name it as hf:{folder}" in done.stdout
    assert folder.name.startswith("long-")
    recipe = RewardRecipe.model_validate_json((folder / "recipe.json").read_text())
    assert (recipe.objective, recipe.pairs, recipe.held_out) == ("long", 39, 5)
    long, short = open_reward_model(f"hf:{folder}")("new", ["oak " * 7, "elm"])
    assert long > short
    again = train_reward(tmp_path, environment, rows, "--objective", "long")
    assert (again.exit_code, again.stderr.splitlines()[-1]) == (1, f"error: {folder} is there already: name another folder")


@pytest.mark.parametrize(("source", "options"), [("long={}", ()), ("{}", ("--objective", "long"))])
def test_pairs_are_those_of_the_named_objective(
    environment: dict[str, str | None], tmp_path: Path, source: str, options: tuple[str, ...]
) -> None:
    out = tmp_path / "judges" / "long"
    done = train_reward(tmp_path, environment, PAIRS, "--out", str(out), *options, source=source)
    assert done.exit_code == 0, done.output
    assert "on the training pairs, too few to hold some out" in done.stdout
    recipe = RewardRecipe.model_validate_json((out / "recipe.json").read_text())
    assert (recipe.objective, recipe.pairs, recipe.held_out) == ("long", 8, 0)


@pytest.mark.parametrize(
    ("rows", "options", "given", "words"),
    [
        (ROWS, (), QUICK, "a reward model is of one objective: name it, as --objective long, of long, short"),
        (ROWS, ("--objective", "warm"), QUICK, "unknown objective 'warm': the data has labels for long, short"),
        (ROWS, ("--objective", "mod"), QUICK, "'mod' cannot be an objective's name"),
        (PAIRS, (), QUICK, "a pair without an objective: name each file's, as helpful=FILE"),
        (ROWS, ("--objective", "long"), {"beta": 0.2}, "sets beta: a reward model has no reference, leave it out"),
        (
            ROWS,
            ("--objective", "long"),
            {"max_prompt_tokens": 1},
            "no pair to train a reward model of 'long' on: of 44 pairs 44",
        ),
        (ROWS, ("--objective", "long", "--base", "/nowhere"), QUICK, "no model '/nowhere'"),
    ],
)
def test_a_wrong_command_gets_one_sentence(
    environment: dict[str, str | None],
    data_dir: Path,
    tmp_path: Path,
    rows: Sequence[Mapping[str, object]],
    options: tuple[str, ...],
    given: Mapping[str, object],
    words: str,
) -> None:
    refused = train_reward(tmp_path, environment, rows, *options, given=given)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not any(data_dir.iterdir())


def test_a_file_called_reward_can_be_trained_on(environment: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "reward").write_text('{"prompt": 3}\n')
    refused = CliRunner().invoke(app, ["train", str(tmp_path / "reward"), "reward"], env=environment)
    assert (refused.exit_code, "line 1" in refused.stderr) == (2, True), refused.output
