"""The commands that work on this machine's files, and what all commands promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.policies import PolicyStore
from tests.fakes import write_policy_set

COMMANDS = [
    "up",
    "demo",
    "generate",
    "conflicts",
    "score",
    "evaluate",
    "sft",
    "train",
    "train reward",
    "weights",
    *(f"jobs {name}" for name in ("submit", "list", "show", "watch", "cancel", "delete", "pairs", "candidates", "report")),
    *(f"policies {name}" for name in ("list", "show", "activate", "delete", "import", "soup")),
    *(f"queue {name}" for name in ("show", "requeue")),
]


def sipo(data_dir: Path, *args: str) -> Result:
    return CliRunner().invoke(app, args, env={"SIPO_DATA_DIR": str(data_dir), "COLUMNS": "200"})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(tmp_path: Path, command: str) -> None:
    result = sipo(tmp_path, *command.split(), "--help")
    assert result.exit_code == 0
    assert f"Usage: root {command}" in result.stdout
    text = " ".join(result.stdout.split())
    assert len(text) > 150
    shown = ("generate", "demo", "conflicts", "score", "train", "jobs submit", "policies import", "queue show", "queue requeue")
    if command in shown:
        assert f"sipo {command} " in text, "an example"


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["policies", "list"], env={"SIPO_LOG_LEVEL": "loud"})
    assert result.exit_code == 2
    assert "SIPO_LOG_LEVEL" in result.stderr
    assert "Traceback" not in result.output


def test_policies_are_listed_shown_and_activated(data_dir: Path) -> None:
    assert "no policy sets" in sipo(data_dir, "policies", "list").stdout
    write_policy_set(data_dir / "policies", "demo:1", ["concise", "warm"], current=True)
    write_policy_set(data_dir / "policies", "demo:2", ["concise", "warm"])
    lines = sipo(data_dir, "policies", "list").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["demo:1", "*"], ["demo:2", "concise,"]]
    activated = sipo(data_dir, "policies", "activate", "demo:2")
    assert (activated.exit_code, activated.stdout.strip()) == (0, "demo:2 is current")
    shown = sipo(data_dir, "policies", "show", "demo").stdout
    assert '"version": 2' in shown
    assert str(data_dir / "policies" / "demo" / "2" / "warm") in shown


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["policies", "show", "nobody"], "nobody"),
        (["policies", "activate", "demo"], "demo:1"),
        (["policies", "activate", "demo:9"], "demo:1"),
        (["policies", "import", "helpful", "--name", "x"], "helpful=DIR"),
        (["policies", "import", "helpful=/nowhere", "--name", "x"], "/nowhere"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_2(data_dir: Path, args: list[str], words: str) -> None:
    write_policy_set(data_dir / "policies", "demo:1", ["concise", "warm"])
    result = sipo(data_dir, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> Path:
    """A folder with the adapters helpful and harmless."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for name in ("helpful", "harmless"):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / name)
    return tmp_path


def test_peft_adapters_are_imported_as_a_policy_set(data_dir: Path, tiny_base: Path, trained: Path) -> None:
    adapters = [f"{name}={trained / name}" for name in ("helpful", "harmless")]
    result = sipo(data_dir, "policies", "import", *adapters, "--name", "mine", "--model", str(tiny_base), "--activate")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    published = PolicyStore(data_dir / "policies").get("mine")
    assert (published.id, published.objectives) == ("mine:1", ["helpful", "harmless"])
    assert published.manifest.prompt_format.kind == "chat"

    (trained / "harmless" / "adapter_model.safetensors").unlink()
    broken = sipo(data_dir, "policies", "import", *adapters, "--name", "mine", "--model", str(tiny_base))
    assert broken.exit_code == 2, broken.output
    assert [known.id for known in PolicyStore(data_dir / "policies").sets()] == ["mine:1"]


def test_a_home_folder_after_the_equals_sign_is_found(
    data_dir: Path, tiny_base: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(trained))
    adapters = ["helpful=~/helpful", "harmless=~/harmless"]
    result = sipo(data_dir, "policies", "import", *adapters, "--name", "mine", "--model", str(tiny_base))
    assert result.exit_code == 0, result.output
    nobody = sipo(data_dir, "policies", "import", "helpful=~nobody-here/out", "--name", "mine", "--model", str(tiny_base))
    assert (nobody.exit_code, nobody.stderr) == (2, "error: ~nobody-here/out is no folder\n")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("someone/Another-1B", True),
        ("/elsewhere/another", True),
        ("someone/{upper}", True),
        ("someone/{base}", False),
        ("/elsewhere/{base}/", False),
        ("/home/me/.cache/huggingface/hub/models--someone--{base}/snapshots/0123abcd", False),
        (None, False),
    ],
)
def test_an_adapter_that_names_another_base_is_imported_with_a_notice(
    data_dir: Path, tiny_base: Path, trained: Path, named: str | None, told: bool
) -> None:
    config = trained / "helpful" / "adapter_config.json"
    base_name = named and named.format(base=tiny_base.name, upper=tiny_base.name.upper())
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base_name}))
    adapters = [f"{name}={trained / name}" for name in ("helpful", "harmless")]
    result = sipo(data_dir, "policies", "import", *adapters, "--name", "mine", "--model", str(tiny_base))
    assert result.exit_code == 0, result.output
    assert "published mine:1" in result.stdout
    assert result.stderr.count("\n") == int(told)
    if told:
        assert result.stderr.startswith("note: helpful") and str(base_name) in result.stderr and str(tiny_base) in result.stderr


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """6 rows for a and b, 4 of which conflict; 2 rows for a alone."""
    labels = [{"a": 0, "b": 1}] * 4 + [{"a": 1, "b": 1}] * 2 + [{"a": 1}] * 2
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}?", "response_0": "x", "response_1": "y", "labels": label} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_conflicts_are_counted_overall_and_by_pair(data_dir: Path, labelled: Path) -> None:
    result = sipo(data_dir, "conflicts", str(labelled))
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["a", "8"] in lines
    assert ["b", "6"] in lines
    assert ["a,", "b", "6", "4", "0.667"] in lines
    assert "conflict ratio: 0.667 (4 of 6" in result.stdout


def test_a_subset_has_the_ratio_and_size_asked_for(data_dir: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.jsonl"
    result = sipo(data_dir, "conflicts", str(labelled), "--subset-ratio", "0.5", "--size", "4", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "conflict ratio: 0.500 (2 of 4" in sipo(data_dir, "conflicts", str(out)).stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--size", "4"], "--subset-ratio, --size and --out"),
        (["--subset-ratio", "1", "--size", "5", "--out", "never.jsonl"], "need 5 conflicting"),
    ],
)
def test_an_impossible_subset_is_refused(data_dir: Path, labelled: Path, args: list[str], words: str) -> None:
    result = sipo(data_dir, "conflicts", str(labelled), *args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not Path("never.jsonl").exists()
