"""`sipo train` with a tiny model: real files, and in the slow tests real training processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.cli.train.progress import Display
from services.common.contract.jobs import JobSpec
from sipo.errors import InvalidRequest, TrainingFailed
from sipo.lora import load_adapter
from sipo.models import Base, model_sha256
from sipo.policies import PolicySet, PolicyStore, adapter_sha256
from sipo.prompts import PromptFormat
from sipo.training.planning import Planner
from sipo.training.presets import PRESETS, read_preset
from sipo.training.run_folder import read_run
from sipo.training.settings import Progress, TrainMetrics, TrainRun
from support import PATIENCE
from tests.fakes import write_policy_set
from tests.policies import publish_random
from tests.trainer import stand_in, write_adapter

OBJECTIVES = ["concise", "warm"]
QUICK = {"lora_rank": 4, "lora_alpha": 8, "batch_size": 2, "max_prompt_tokens": 64}

Train = Callable[..., Result]


def environment(data_dir: Path, tiny_base: Path, tmp_path: Path) -> dict[str, str]:
    values = {"SIPO_DATA_DIR": data_dir, "SIPO_CACHE_DIR": tmp_path / "cache", "SIPO_MODEL": tiny_base, "COLUMNS": 200}
    return {name: str(value) for name, value in values.items()}


@pytest.fixture
def train(data_dir: Path, tiny_base: Path, tmp_path: Path) -> Train:
    """With --out runs (or `out`) and --settings quick.yaml unless they are given."""
    quick = tmp_path / "quick.yaml"
    quick.write_text(yaml.safe_dump(QUICK))

    def train(*args: object, out: Path | None = tmp_path / "runs") -> Result:
        given = [*map(str, args)]
        for option, value in (("--out", out), ("--settings", quick)):
            given += [] if option in given or value is None else [option, str(value)]
        return CliRunner().invoke(app, ["train", *given], env=environment(data_dir, tiny_base, tmp_path))

    return train


@pytest.fixture
def policies(data_dir: Path, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PolicySet:
    """demo:1, current."""
    return publish_random(
        PolicyStore(data_dir / "policies"),
        tiny_base,
        tmp_path,
        dict.fromkeys(OBJECTIVES, ("q_proj", "v_proj")),
        base_sha256=model_sha256(tiny_base, tmp_path / "cache"),
        prompt_format=PromptFormat.of(tiny_tokenizer, system="Be kind."),
    )


@pytest.fixture
def made(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the training process by tests.trainer.stand_in; lists the runs, as "runs/warm"."""
    made: list[str] = []
    quick = stand_in(adapter, made)

    async def run_child(path: Path, tell: Any, command: Any) -> Any:
        progress = Progress(objective="?", stage="training", step=1, of=2, seconds_left=3, loss=0.5, margin=0.1, accuracy=0.75)
        await tell(progress)
        return await quick(path, lambda _: tell(progress))

    monkeypatch.setattr(import_module("gateway.cli.train.command"), "run_child", run_child)
    return made


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """6 rows; of every two the first has conflicting labels. The last one is for warm alone."""
    rows = [
        {
            "prompt": f"q{i}",
            "response_0": f"no, not {i}",
            "response_1": "yes " * (1 + i % 3),
            "labels": {"concise": i % 2, "warm": 1},
        }
        for i in range(6)
    ]
    del rows[5]["labels"]["concise"]  # type: ignore[attr-defined]
    return write(tmp_path / "labelled.jsonl", rows)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """As a job gives them: 4 for all policies, one for warm alone."""
    rows: list[dict[str, Any]] = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no", "round": 1} for i in range(4)]
    return write(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "rejected": "never", "objective": "warm"}])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def run_of(folder: Path) -> TrainRun:
    return read_run(folder / "run.yaml")


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def settings_file(path: Path, **fields: Any) -> Path:
    path.write_text(yaml.safe_dump(QUICK | fields))
    return path


def test_labelled_data_gives_each_objective_a_fresh_policy_on_its_own_labels(
    train: Train, made: list[str], labelled: Path, tiny_base: Path, tmp_path: Path
) -> None:
    result = train(labelled)
    assert result.exit_code == 0, result.output
    assert made == ["runs/concise", "runs/warm"]
    concise, warm = tmp_path / "runs" / "concise", tmp_path / "runs" / "warm"
    assert [(row["chosen"], row["rejected"]) for row in rows_of(concise)][:2] == [("no, not 0", "yes "), ("yes yes ", "no, not 1")]
    assert (len(rows_of(concise)), len(rows_of(warm))) == (5, 6)
    run = run_of(warm)
    assert (run.objective, run.base, run.base_name, run.start) == ("warm", tiny_base, str(tiny_base), None)
    assert run.settings == read_preset("small").alignment.model_copy(update=QUICK)
    assert run.settings.alpha == 0
    table = [line.split() for line in result.stdout.splitlines()]
    assert ["warm", "1", "0", "0.500", "0.500", "1.000", "1.000", "0"] in table
    assert ["warm:", str(warm)] in table
    assert "warm: training 1/2, loss 0.5000, margin 0.100, accuracy 0.75, 3 s left" in result.stdout
    assert "too few pairs to hold some out" in result.stdout


def test_pairs_go_on_from_a_policy_set(train: Train, made: list[str], policies: PolicySet, pairs: Path, tmp_path: Path) -> None:
    result = train(pairs, "--start", "demo", "--preset", "beavertails")
    assert result.exit_code == 0, result.output
    for name, rejected in (("concise", ["no"] * 4), ("warm", ["no"] * 4 + ["never"])):
        folder = tmp_path / "runs" / name
        run = run_of(folder)
        assert [row["rejected"] for row in rows_of(folder)] == rejected
        assert set(rows_of(folder)[0]) == {"prompt", "chosen", "rejected"}
        assert (run.start, run.prompt_format) == (policies.adapter_dir(name), policies.manifest.prompt_format)
        assert (run.settings.learning_rate, run.settings.alpha, run.settings.epochs) == (5e-6, 0.1, 1)


def test_a_file_of_pairs_for_each_objective_makes_a_first_alignment(
    train: Train, made: list[str], data_dir: Path, tmp_path: Path
) -> None:
    """Nothing but the files and a name: the runs have a folder of their own, and other data another one."""
    helpful = write(tmp_path / "a=b.jsonl", [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(3)])
    harmless = write(tmp_path / "harmless.jsonl", [{"prompt": "q0", "chosen": "no", "rejected": "yes"}])
    sources = [f"helpful={helpful}", f"harmless={harmless}", "--publish", "mine"]
    for _ in range(2):
        result = train(*sources, out=None)
        assert result.exit_code == 0, result.output
        assert "published mine:1" in result.output
    [folder] = (data_dir / "runs").iterdir()
    assert folder.name.startswith("mine-")
    assert [(row["chosen"], row["rejected"]) for row in rows_of(folder / "helpful")] == [("yes", "no")] * 3
    assert [(row["chosen"], row["rejected"]) for row in rows_of(folder / "harmless")] == [("no", "yes")]
    assert (run_of(folder / "helpful").method, run_of(folder / "helpful").start) == ("dpo", None)
    assert "2 of 3 rows have a label for one objective only" in result.stderr
    both = write(tmp_path / "both.jsonl", [{"objective": name, "prompt": "q", "chosen": "a", "rejected": "b"} for name in "xy"])
    assert "published mine:2" in train(both, "--publish", "mine", out=None).output
    assert len([*(data_dir / "runs").iterdir()]) == 2


def test_what_will_be_left_out_of_a_training_is_counted_before_it_starts(train: Train, made: list[str], tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "objective": "warm"}
    changes: list[dict[str, str]] = [
        {},
        {"prompt": "q" * 65},
        {"chosen": "no"},
        {"chosen": "y" * 300},
        {"chosen": "no", "rejected": "yes"},
    ]
    result = train(write(tmp_path / "pairs.jsonl", [row | change for change in [*changes, {"chosen": " "}, {"split": "test"}]]))
    assert result.exit_code == 0, result.output
    assert [line.partition(": ")[2] or line for line in result.stderr.splitlines()] == [
        "rows whose `split` holds them out of training (1)",
        "in 1 of 6 rows the two responses are the same",
        "1 of 6 pairs left out: the prompt is longer than max_prompt_tokens = 64",
        "1 of 6 pairs left out: chosen and rejected are the same",
        "1 response cut: longer than max_response_tokens = 256",
        "in 1 of 6 pairs the preferred response is empty",
        "1 pair of 6 has a twin that prefers the other response",
    ]


def test_the_shipped_policies_can_be_started_from_before_anything_ran(
    made: list[str], data_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        app, ["train", str(pairs), "--start", "demo", "--out", str(tmp_path / "runs")], env={"SIPO_DATA_DIR": str(data_dir)}
    )
    assert result.exit_code == 0, result.output
    assert made == ["runs/concise", "runs/warm"]


def test_lw_is_one_policy_on_pairs_with_both_sides_weights(train: Train, made: list[str], labelled: Path, tmp_path: Path) -> None:
    result = train(labelled, "--method", "lw", "--weights", "concise=0.7,warm=0.3")
    assert result.exit_code == 0, result.output
    assert made == ["runs/lw"]
    rows = rows_of(tmp_path / "runs" / "lw")
    assert [row["opposing_weight"] for row in rows] == [pytest.approx(one) for one in (0.3, 0, 0.3, 0, 0.3, 0)]
    assert rows[0]["chosen"] == "no, not 0", "the heavier side's"


@pytest.mark.parametrize(("args", "own", "other"), [([], "warm", "concise"), (["--objective", "concise"], "concise", "warm")])
def test_modpo_takes_the_heaviests_pairs_and_the_others_as_margins(
    train: Train, made: list[str], policies: PolicySet, labelled: Path, tmp_path: Path, args: list[str], own: str, other: str
) -> None:
    weights = {"concise": 0.4, "warm": 0.6}
    result = train(labelled, "--method", "modpo", "--start", "demo:1", "--weights", "concise=0.4,warm=0.6", *args)
    assert result.exit_code == 0, result.output
    run = run_of(tmp_path / "runs" / "modpo")
    assert (run.method, run.objective, run.start, run.weights) == ("modpo", own, None, weights)
    assert run.beta == pytest.approx(run.settings.beta / weights[own])
    assert [(one.adapter, one.weight) for one in run.margins] == [(policies.adapter_dir(other), weights[other])]
    assert len(rows_of(tmp_path / "runs" / "modpo")) == {"concise": 5, "warm": 6}[own]


def test_the_same_command_does_nothing_twice_and_publishes_once(
    train: Train, made: list[str], policies: PolicySet, data_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    args = [pairs, "--start", "demo:1", "--publish", "demo"]
    first = train(*args)
    assert first.exit_code == 0, first.output
    assert "published demo:2; make it current with `sipo policies activate demo:2`" in first.stdout
    store, before = PolicyStore(data_dir / "policies"), everything(tmp_path / "runs")
    manifest = store.get("demo:2").manifest
    assert (manifest.round, manifest.parent, manifest.prompt_format) == (1, "demo:1", policies.manifest.prompt_format)
    assert manifest.data_sha256 is not None
    assert (manifest.settings["method"], manifest.settings["learning_rates"]) == ("sipo", dict.fromkeys(OBJECTIVES, 2e-4))
    assert list(manifest.metrics) == OBJECTIVES
    assert store.get("demo").id == "demo:1", "it was not made current"

    second = train(*args)
    assert second.exit_code == 0, second.output
    assert made == ["runs/concise", "runs/warm"]
    assert "warm: was finished before" in second.stdout
    assert "published demo:2;" in second.stdout
    assert everything(tmp_path / "runs") == before
    assert [one.id for one in store.sets()] == ["demo:1", "demo:2"]


def test_policies_lie_on_their_reference_and_so_do_those_that_go_on_from_them(
    train: Train, made: list[str], labelled: Path, pairs: Path, data_dir: Path, tiny_base: Path, tmp_path: Path
) -> None:
    tuned, other = write_adapter(tmp_path / "tuned"), write_adapter(tmp_path / "other")
    sha256 = adapter_sha256(tuned)
    first = train(labelled, "--reference", tuned, "--publish", "mine")
    assert first.exit_code == 0, first.output
    run, policy_set = run_of(tmp_path / "runs" / "warm"), PolicyStore(data_dir / "policies").get("mine:1")
    assert (run.reference, run.reference_sha256) == (tuned, sha256)
    assert policy_set.manifest.reference is not None and policy_set.manifest.reference.sha256 == sha256

    moved = tuned.rename(tmp_path / "moved")
    again = train(labelled, "--reference", moved, "--publish", "mine")
    assert again.exit_code == 0, again.output
    assert made == ["runs/concise", "runs/warm"] and "published mine:1;" in again.output
    assert run_of(tmp_path / "runs" / "warm").reference == moved
    assert "was begun with other arguments" in train(labelled, "--reference", other).stderr

    modpo = ["--method", "modpo", "--weights", "concise=0.4,warm=0.6"]
    for name, args in (("sipo", [pairs, "--publish", "child"]), ("modpo", [labelled, *modpo])):
        result = train(*args, "--start", "mine:1", out=tmp_path / name)
        assert result.exit_code == 0, result.output
        run = run_of(tmp_path / name / ("warm" if name == "sipo" else "modpo"))
        assert (run.reference, run.reference_sha256) == (policy_set.reference_dir, sha256)
    child = PolicyStore(data_dir / "policies").get("child:1").manifest
    assert (child.parent, child.reference) == ("mine:1", policy_set.manifest.reference)
    refused = train(pairs, "--start", "mine:1", "--reference", moved, out=tmp_path / "third")
    assert (
        "the method sipo has no --reference, but --start, --objectives, --publish: its reference is that of --start"
        in refused.stderr
    )
    base = Base.open(str(tiny_base), tmp_path / "cache")
    assert Planner(base, policy_set, moved)
    with pytest.raises(InvalidRequest, match="other is not the reference of mine:1, which its policies lie on: leave it out"):
        Planner(base, policy_set, other)


def test_a_policy_whose_answers_were_spoilt_is_not_published(
    train: Train, made: list[str], labelled: Path, data_dir: Path, tmp_path: Path
) -> None:
    assert train(labelled).exit_code == 0
    path = tmp_path / "runs" / "warm" / "metrics.json"
    before = {"prompts": 8, "tokens": 30, "empty": 0, "endless": 2, "distinct": 8}
    metrics = json.loads(path.read_text()) | {"answered_before": before, "answered": before | {"empty": 7, "tokens": 0.5}}
    path.write_text(json.dumps(metrics))
    result = train(labelled, "--publish", "mine")
    assert result.exit_code == 1
    assert (
        "warm: greedy answers to 8 prompts, at most 32 tokens, have 0 (before 30); 7 are empty (0), 2 had not ended (2)"
        in result.stdout
    )
    assert "the policy of 'warm' is not published: 7 of 8 greedy answers are empty, and before the training 0 were" in result.stderr
    assert PolicyStore(data_dir / "policies").names() == []


@pytest.mark.parametrize("changed", ["settings", "data", "objectives", "a folder of something else"])
def test_a_folder_of_other_runs_is_refused_and_left_as_it_is(
    train: Train, made: list[str], labelled: Path, tmp_path: Path, changed: str
) -> None:
    out, args = tmp_path / "runs", [labelled]
    if changed == "a folder of something else":
        (out / "warm").mkdir(parents=True)
        (out / "warm" / "notes.txt").write_text("mine")
    else:
        assert train(*args).exit_code == 0
    before = everything(out)
    if changed == "settings":
        args += ["--settings", settings_file(tmp_path / "other.yaml", seed=1)]
    elif changed == "data":
        write(labelled, [json.loads(line) for line in labelled.read_text().splitlines()][:-1])
    elif changed == "objectives":
        args += ["--objectives", "warm"]
    made.clear()
    result = train(*args)
    assert (result.exit_code, result.stdout, made) == (2, "", [])
    assert "was begun with other arguments or data: name another folder with --out" in result.stderr
    assert everything(out) == before


GOOD = '{"prompt": "?", "chosen": "a", "rejected": "b"}\n'
SAME = '{"prompt": "?", "chosen": "a", "rejected": "a"}\n'
LONG = f'{{"prompt": "{"long " * 20}", "chosen": "a", "rejected": "b"}}\n'
LABELLED = '{"prompt": "?", "response_0": "a", "response_1": "b", "labels": {"warm": 1, "concise": 0}}\n'


@pytest.mark.parametrize(
    ("content", "args", "words"),
    [
        (GOOD + "\n" + '{"prompt": "?", "chosen": "a"}\n', ["--start", "demo"], "line 3: `rejected` is missing"),
        (
            GOOD + '{"prompt": "?", "chosen": ["a"], "rejected": "b"}\n',
            ["--start", "demo"],
            "line 2: `chosen[0]` is 'a': it must be a message",
        ),
        (GOOD + "no JSON\n", ["--start", "demo"], "line 2: not JSON"),
        (GOOD + GOOD.replace("}", ', "objective": "loud"}'), ["--start", "demo"], "line 2: `objective` is 'loud': demo:1 has"),
        (LABELLED + "no JSON\n", [], "line 2: not JSON"),
        ("", [], "empty"),
        (None, [], "there is no file"),
        (SAME, ["--start", "demo"], "in 1 chosen and rejected are the same"),
        (SAME + LONG, ["--start", "demo"], "of 2 pairs 1 have prompts longer than max_prompt_tokens = 64"),
        (GOOD.replace("}", ', "objective": "warm"}'), ["--start", "demo"], "no pair to train 'concise' on: of 0 pairs"),
        (GOOD, [], "the method sipo needs --start"),
        (
            GOOD,
            ["--method", "dpo"],
            "takes labelled data, and these pairs name no objective: give a file for each, as helpful=FILE",
        ),
        (GOOD, ["--start", "nobody"], "nobody"),
        (GOOD, ["--start", "demo", "--objectives", "loud"], "unknown objective 'loud': demo:1 has policies for concise, warm"),
        (GOOD, ["--start", "demo", "--weights", "warm=1"], "the method sipo has no --weights, but --start, --objectives"),
        (LABELLED, ["--method", "sipo", "--start", "demo"], "takes pairs, and the data is labelled"),
        (LABELLED, ["--start", "demo"], "the method dpo has no --start"),
        (LABELLED, ["--objectives", "warm,loud"], "unknown objective 'loud': the data has labels for warm, concise"),
        (LABELLED.replace("warm", "soup"), [], "'soup' cannot be an objective's name"),
        (LABELLED, ["--publish", "My Policy"], "no policy name"),
        (LABELLED, ["--publish", "mine", "--objectives", "warm"], "two or more objectives"),
        (LABELLED, ["--method", "lw"], "the method lw needs --weights"),
        (LABELLED, ["--method", "lw", "--weights", "warm=1", "--publish", "mine"], "the method lw has no --publish"),
        (LABELLED, ["--method", "lw", "--weights", "warm=0.5,concise=0.6"], "sum to 1.1"),
        (LABELLED, ["--method", "lw", "--weights", "warm=0.5,loud=0.5"], "unknown objective 'loud'"),
        (LABELLED, ["--method", "lw", "--weights", "warm"], "write weights as"),
        (LABELLED, ["--method", "modpo", "--weights", "warm=1"], "the method modpo needs --start"),
        (
            LABELLED,
            ["--method", "modpo", "--start", "demo", "--weights", "warm=1,concise=0", "--objective", "concise"],
            "MODPO divides by the weight of 'concise'",
        ),
        (
            LABELLED,
            ["--method", "modpo", "--start", "demo", "--weights", "warm=1", "--objective", "concise"],
            "--objective is 'concise', which has no weight",
        ),
        (
            LABELLED.replace("concise", "loud"),
            ["--method", "modpo", "--start", "demo", "--weights", "warm=0.6,loud=0.4"],
            "demo:1 has no policy for 'loud'",
        ),
        (LABELLED, ["--reference", "nowhere"], "nowhere"),
        (LABELLED, ["--preset", "huge"], "no preset 'huge': there are beavertails, helpsteer, small"),
        (LABELLED, ["--accelerate", "nothing"], "no accelerate configuration 'nothing'"),
        (LABELLED, ["--settings", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_folder(
    train: Train, made: list[str], policies: PolicySet, tmp_path: Path, content: str | None, args: list[str], words: str
) -> None:
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    result = train(file, *args)
    assert (result.exit_code, result.stdout, made) == (2, "", []), result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epoch: 1\n", "`epoch` is no known field: did you mean `epochs`?"),
        ("beta: 0\n", "`beta` must be more than 0, not 0"),
        ("- beta\n", "must be a mapping of names to values"),
        ("a: [\n", "is no YAML"),
        ("alpha: 0.1\n", "only the method sipo has it"),
    ],
)
def test_a_bad_settings_file_is_told_by_its_field(
    train: Train, made: list[str], labelled: Path, tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    result = train(labelled, "--settings", path)
    assert (result.exit_code, result.stdout, made) == (2, "", [])
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [["--method", "lw"], ["--method", "modpo", "--start", "demo"]])
def test_lw_and_modpo_are_defined_for_reverse_kl_alone(
    train: Train, made: list[str], policies: PolicySet, labelled: Path, tmp_path: Path, args: list[str]
) -> None:
    settings = settings_file(tmp_path / "other.yaml", divergence="js_divergence")
    result = train(labelled, *args, "--weights", "concise=0.4,warm=0.6", "--settings", settings)
    assert (result.exit_code, made) == (2, [])
    assert f"the method {args[1]} is defined for reverse_kl, not for js_divergence" in result.stderr


def test_policies_of_another_base_are_refused(train: Train, made: list[str], data_dir: Path, pairs: Path, tmp_path: Path) -> None:
    write_policy_set(data_dir / "policies", "demo:1", OBJECTIVES, current=True)
    result = train(pairs, "--start", "demo")
    assert (result.exit_code, made) == (2, [])
    assert "trained on smollm2-135m" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_every_preset_can_be_read_and_the_small_one_is_that_of_jobs() -> None:
    presets = {path.stem: read_preset(path.stem) for path in PRESETS.glob("*.yaml")}
    assert set(presets) == {"small", "beavertails", "helpsteer"}
    assert {preset.alignment.alpha for preset in presets.values()} == {0}
    job = JobSpec(policy="demo")
    assert presets["small"].alignment == job.alignment.model_copy(update={"alpha": 0})
    assert presets["small"].sipo_for("warm") == job.training
    assert [presets["beavertails"].sipo_for(name).learning_rate for name in ("helpful", "harmless")] == [5e-6, 5e-5]
    with pytest.raises(InvalidRequest, match="there are beavertails, helpsteer, small"):
        read_preset("../presets/small")


async def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note has a line of its own on both."""
    module = import_module("gateway.cli.train.progress")
    reference = Progress(objective="warm", stage="reference", step=2, of=8, seconds_left=6)
    steps = [
        Progress(objective="warm", stage="training", step=i, of=4, seconds_left=4 - i, loss=0.5, margin=-0.25, accuracy=0.75)
        for i in range(1, 5)
    ]
    told = [reference, *steps[:2], steps[1].model_copy(update={"note": "out of memory: goes on"}), *steps[2:]]

    async def shown(terminal: bool) -> str:
        console = Console(force_terminal=terminal, width=120, record=True, soft_wrap=True, highlight=False)
        monkeypatch.setattr(module, "console", console)
        with console.capture() as capture, Display() as display:
            display.begin("warm", "8 pairs")
            for progress in told:
                await display.tell(progress)
            display.end("finished after 5 s")
        return capture.get()

    lines = (await shown(terminal=False)).splitlines()
    assert [line.split(" s  ")[-1] for line in lines] == [
        "warm: loads the model, 8 pairs",
        "warm: reference 2/8 pairs, 6 s left",
        "warm: training 1/4, loss 0.5000, margin -0.250, accuracy 0.75, 3 s left",
        "warm: out of memory: goes on",
        "warm: finished after 5 s",
    ]
    monkeypatch.setattr(module, "LINE_SECONDS", 0)
    assert len((await shown(terminal=False)).splitlines()) == 8
    live = await shown(terminal=True)
    assert "warm: out of memory: goes on" in live
    assert "finished after 5 s" in live
    assert "\x1b" in live


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was_and_what_it_trains_can_be_published(
    train: Train, data_dir: Path, tiny_base: Path, labelled: Path, tmp_path: Path
) -> None:
    """Killed in the second policy's run. The first one's is left as it is, the second one's resumes."""
    out = tmp_path / "runs"
    quick = settings_file(tmp_path / "long.yaml", epochs=12, checkpoint_steps=1, learning_rate=1e-3)
    args = ["train", str(labelled), "--out", str(out), "--settings", str(quick), "--publish", "mine"]
    command = [sys.executable, "-c", "from gateway.cli import app; app()", *args]
    killed = subprocess.Popen(command, env=os.environ | environment(data_dir, tiny_base, tmp_path), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not [*(out / "warm").glob("checkpoints/checkpoint-*/whole")]:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    [child] = psutil.Process(killed.pid).children()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    psutil.wait_procs([child], timeout=PATIENCE)
    assert not (out / "warm" / "metrics.json").exists()
    before = everything(out / "concise")

    result = train(*args[1:])
    assert result.exit_code == 0, result.output
    assert everything(out / "concise") == before
    assert "concise: was finished before" in result.stdout
    first = next(line for line in result.stdout.splitlines() if "warm: training" in line)
    assert not first.partition("training ")[2].startswith("1/"), "it began again"
    for name in OBJECTIVES:
        assert load_adapter(out / name / "adapter").modules
        assert (out / name / "adapter" / "README.md").is_file()
        assert (out / name / "adapter" / "loss.png").is_file()
    published = PolicyStore(data_dir / "policies").get("mine:1")
    assert (published.manifest.round, published.manifest.parent, published.manifest.settings["method"]) == (0, None, "dpo")
    assert published.manifest.metrics["warm"]["after"]["loss"] < published.manifest.metrics["warm"]["before"]["loss"]


@pytest.mark.slow
def test_modpo_trains_and_a_run_that_fails_says_why(
    train: Train, policies: PolicySet, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [labelled, "--method", "modpo", "--start", "demo", "--weights", "concise=0.4,warm=0.6"]
    result = train(*args)
    assert result.exit_code == 0, result.output
    assert "modpo: finished after" in result.stdout

    async def diverges(*_: Any) -> TrainMetrics:
        raise TrainingFailed("it diverged")

    monkeypatch.setattr(import_module("gateway.cli.train.command"), "run_child", diverges)
    result = train(*args, "--out", tmp_path / "bad")
    assert (result.exit_code, "it diverged" in result.stderr) == (1, True)
