"""`sipo score` with a tiny model and random policies: real files in, real files out."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.lora import ADAPTABLE_MODULES
from sipo.models import model_sha256
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Weights, format_weights, sampling_weights
from sipo.prompts import PromptFormat
from sipo.rewards import RewardModel
from tests.fakes import write_policy_set
from tests.policies import publish_random, rewards_one_by_one

pytestmark = pytest.mark.slow

OBJECTIVES = ["concise", "warm"]
SOUPS = sampling_weights(OBJECTIVES)

Score = Callable[..., Result]


@pytest.fixture
def policies(data_dir: Path, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PolicySet:
    """demo:1, the only set."""
    return publish_random(
        PolicyStore(data_dir / "policies"),
        tiny_base,
        tmp_path,
        dict.fromkeys(OBJECTIVES, ADAPTABLE_MODULES),
        base_sha256=model_sha256(tiny_base, tmp_path / "cache"),
        prompt_format=PromptFormat.of(tiny_tokenizer),
    )


@pytest.fixture
def score(data_dir: Path, tiny_base: Path, tmp_path: Path) -> Score:
    def score(*args: object) -> Result:
        env = {"SIPO_DATA_DIR": data_dir, "SIPO_CACHE_DIR": tmp_path / "cache", "SIPO_MODEL": tiny_base, "COLUMNS": "200"}
        return CliRunner().invoke(app, ["score", *map(str, args)], env={name: str(value) for name, value in env.items()})

    return score


def answers(path: Path, rows: int = 3) -> Path:
    written = [
        {"prompt": f"What is {i}?", "responses": [f"{i}, I think.", "Nothing at all"] + ["é"] * (i % 2)} for i in range(rows)
    ]
    return write(path, written)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def one_by_one(base: Path, policies: PolicySet, row: dict[str, Any], soups: list[Weights]) -> list[dict[str, float]]:
    """Of the row's texts, each with an end token, by another computation."""
    tokenizer, prompt_format = AutoTokenizer.from_pretrained(base), policies.manifest.prompt_format
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in row["responses"]]
    return rewards_one_by_one(base, policies, prompt_format.prompt_ids(row["prompt"], tokenizer), ids, soups)


def test_each_row_gets_the_rewards_of_policies_and_soups_in_order(
    score: Score, policies: PolicySet, tiny_base: Path, tmp_path: Path
) -> None:
    file = answers(tmp_path / "answers.jsonl")
    result = score(file)
    assert result.exit_code == 0, result.output
    rows, found = read(file.read_text()), read(result.stdout)
    assert [one["prompt"] for one in found] == [row["prompt"] for row in rows]
    for row, one in zip(rows, found, strict=True):
        assert (one["policy_set"], one["length_normalized"]) == ("demo:1", False)
        wanted = one_by_one(tiny_base, policies, row, SOUPS)
        assert [list(rewards) for rewards in one["rewards"]] == [[*OBJECTIVES, *map(format_weights, SOUPS)]] * len(row["responses"])
        assert one["rewards"] == [pytest.approx(rewards, abs=1e-3) for rewards in wanted]
    assert "3 rows scored, 0 could not be" in result.stderr
    assert "accuracy" not in result.stderr, "nothing is labelled"


def test_soups_are_chosen_and_rewards_counted_per_token(score: Score, policies: PolicySet, tiny_base: Path, tmp_path: Path) -> None:
    file = answers(tmp_path / "answers.jsonl", 1)
    [row], soup = read(file.read_text()), {"concise": 0.25, "warm": 0.75}
    [found] = read(score(file, "--weights", "warm=0.75,concise=0.25", "--policy-set", "demo:1", "--length-normalized").stdout)
    wanted = one_by_one(tiny_base, policies, row, [soup])
    for text, rewards, whole in zip(row["responses"], found["rewards"], wanted, strict=True):
        assert rewards == pytest.approx({name: value / (len(text.encode()) + 1) for name, value in whole.items()}, abs=1e-4)
    [found] = read(score(file, "--no-soups").stdout)
    assert [list(rewards) for rewards in found["rewards"]] == [OBJECTIVES] * 2


def test_labelled_pairs_end_with_how_often_each_policy_agrees(score: Score, policies: PolicySet, tmp_path: Path) -> None:
    """Labels made from the rewards themselves: one of three of concise is turned round, none of the two of warm."""
    plain = read(score(answers(tmp_path / "answers.jsonl", 5), "--no-soups").stdout)[::2]
    labels = [{name: int(row["rewards"][1][name] > row["rewards"][0][name]) for name in OBJECTIVES} for row in plain]
    labels[0]["concise"] = 1 - labels[0]["concise"]
    del labels[2]["warm"]
    pairs = [
        {"prompt": row["prompt"], "response_0": f"{i * 2}, I think.", "response_1": "Nothing at all", "labels": label}
        for i, (row, label) in enumerate(zip(plain, labels, strict=True))
    ]
    result = score(write(tmp_path / "pairs.jsonl", pairs), "--no-soups")
    assert result.exit_code == 0, result.output
    assert [one["labels"] for one in read(result.stdout)] == labels
    assert [one["rewards"] for one in read(result.stdout)] == [
        [pytest.approx(rewards, abs=1e-4) for rewards in row["rewards"]] for row in plain
    ]
    lines = [line.split() for line in result.stderr.splitlines()]
    assert ["concise", "3", "2", "0.667"] in lines
    assert ["warm", "2", "2", "1.000"] in lines


def test_a_row_that_cannot_be_scored_says_why_and_stops_nothing(score: Score, policies: PolicySet, tmp_path: Path) -> None:
    rows = read(answers(tmp_path / "answers.jsonl", 3).read_text())
    rows[1]["responses"].append("too long " * 40)
    result = score(write(tmp_path / "answers.jsonl", rows))
    assert result.exit_code == 0, result.output
    found = read(result.stdout)
    assert ["rewards" in one for one in found] == [True, False, True]
    assert "response 3 (361) are too long" in found[1]["error"]
    assert "2 rows scored, 1 could not be" in result.stderr
    assert f"row 2: {found[1]['error']}" in result.stderr


def test_a_file_of_which_nothing_could_be_scored_has_failed(score: Score, policies: PolicySet, tmp_path: Path) -> None:
    result = score(write(tmp_path / "answers.jsonl", [{"prompt": "q", "responses": ["too long " * 40]}] * 2))
    assert result.exit_code == 1, result.output
    assert ["error" in one for one in read(result.stdout)] == [True, True]
    assert "0 rows scored, 2 could not be" in result.stderr


def test_rewards_that_are_no_numbers_are_an_error(
    score: Score, policies: PolicySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RewardModel, policy_set: str, groups: list[Any], soups: object = ()) -> list[list[dict[str, float]]]:
        return [[{"concise": float("nan")} for _ in group.responses] for group in groups]

    monkeypatch.setattr(RewardModel, "score", broken)
    [found] = read(score(answers(tmp_path / "answers.jsonl", 1)).stdout)
    assert "not finite" in found["error"]
    assert "rewards" not in found


def test_an_interrupted_run_goes_on_where_it_stopped(
    score: Score, policies: PolicySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, whole, out = answers(tmp_path / "answers.jsonl", 12), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert score(file, "--out", whole).exit_code == 0
    calls, real = [], RewardModel.score

    def interrupted(self: RewardModel, policy_set: str, groups: list[Any], soups: Any = ()) -> Any:
        calls.append(len(groups))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, policy_set, groups, soups)

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "score", interrupted)
        stopped = score(file, "--out", out)
    done = sum(calls[:3])
    assert stopped.exit_code != 0
    assert 0 < done < 12
    assert f"{out} has {done} of 12 rows: go on with --resume" in stopped.stderr
    assert len(read(out.read_text())) == done

    with out.open("a") as torn:
        torn.write('{"policy_set":"de')
    resumed = score(file, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert out.read_text() == whole.read_text()
    assert "12 rows scored" in resumed.stderr


@pytest.mark.parametrize(
    "changed", [["--length-normalized"], ["--no-soups"], ["--policy-set", "demo:2"], []], ids=["unit", "soups", "set", "rows"]
)
def test_rewards_of_different_runs_never_share_a_file(
    score: Score, policies: PolicySet, data_dir: Path, tmp_path: Path, changed: list[str]
) -> None:
    file, out = answers(tmp_path / "answers.jsonl"), tmp_path / "out.jsonl"
    assert score(file, "--out", out).exit_code == 0
    before = out.read_text()
    assert "exists" in score(file, "--out", out).stderr
    write_policy_set(data_dir / "policies", "demo:2", OBJECTIVES)
    if not changed:
        write(file, read(file.read_text())[::-1])
    result = score(file, "--out", out, "--resume", *changed)
    assert result.exit_code == 2
    assert "other rows, policies, weights or options" in result.stderr
    assert out.read_text() == before


@pytest.mark.parametrize("content", ["my notes", "my notes\n"])
def test_a_file_of_something_else_is_never_cut(score: Score, policies: PolicySet, tmp_path: Path, content: str) -> None:
    out = tmp_path / "notes.txt"
    out.write_text(content)
    result = score(answers(tmp_path / "answers.jsonl"), "--out", out, "--resume")
    assert result.exit_code == 2
    assert "name another file" in result.stderr
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy-set", "nobody"], "nobody"),
        (["--weights", "concise=0.5,loud=0.5"], "'loud': this policy set has concise, warm"),
        (["--weights", "concise=0.5,warm=0.6"], "sum to 1.1"),
        (["--weights", "concise"], "write weights as"),
        (["--no-soups", "--weights", "concise=0.5,warm=0.5"], "--no-soups"),
        (["--resume"], "--out"),
    ],
)
def test_wrong_options_get_one_sentence_and_no_file(
    score: Score, policies: PolicySet, tmp_path: Path, args: list[str], words: str
) -> None:
    out = tmp_path / "out.jsonl"
    given = args if args == ["--resume"] else [*args, "--out", out]
    result = score(answers(tmp_path / "answers.jsonl"), *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


GOOD = '{"prompt": "?", "responses": ["a"]}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + "\n" + '{"prompt": "?"}\n', "line 3: `responses` is None: it must be a list"),
        (GOOD + '{"prompt": "?", "responses": []}\n', "line 2: `responses` is []: it must be a list of one text or more"),
        (GOOD + '{"prompt": "", "responses": ["a"]}\n', "line 2: `prompt` is ''"),
        (GOOD + '{"prompt": "?", "responses": [7]}\n', "line 2: `responses[0]` is 7: it must be text"),
        (GOOD + '{"prompt": "?", "responses": ["a"], "labels": {"warm": 1}}\n', "line 2: `labels` are given for 1 response: "),
        (GOOD + "no JSON\n", "line 2: not JSON"),
        ("no JSON\n", "line 1: not JSON"),
        ('{"prompt": "?", "response_0": "a", "response_1": "b", "labels": {"warm": 2}}\n', "line 1: the label of 'warm'"),
        ("", "empty"),
        (None, "there is no file"),
    ],
)
def test_a_bad_file_is_told_by_its_line(score: Score, policies: PolicySet, tmp_path: Path, content: str | None, words: str) -> None:
    file, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"
    if content is not None:
        file.write_text(content)
    result = score(file, "--out", out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_the_policies_must_be_named_unless_there_is_one(score: Score, data_dir: Path, tmp_path: Path) -> None:
    file = answers(tmp_path / "answers.jsonl")
    assert "there are none in" in score(file).stderr
    for name in ("demo:1", "other:1"):
        write_policy_set(data_dir / "policies", name, OBJECTIVES, current=True)
    result = score(file)
    assert result.exit_code == 2
    assert "--policy-set: there are demo, other" in result.stderr


def test_policies_of_another_base_are_refused_before_anything_is_written(score: Score, data_dir: Path, tmp_path: Path) -> None:
    write_policy_set(data_dir / "policies", "demo:1", OBJECTIVES, current=True)
    result = score(answers(tmp_path / "answers.jsonl"), "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert "trained on smollm2-135m" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_progress_is_told_in_lines_without_a_terminal_and_live_on_one(
    score: Score, policies: PolicySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way stdout has the rows alone."""
    file = answers(tmp_path / "answers.jsonl", 8)
    module = import_module("gateway.cli.score.command")  # as an attribute of its package, it is the command
    monkeypatch.setattr(module, "LINE_SECONDS", 0)
    lines = score(file)
    told = [line for line in lines.stderr.splitlines() if " of 8 rows" in line]
    assert len(told) > 1
    assert "s left" in told[1]
    assert len(read(lines.stdout)) == 8

    monkeypatch.setattr(module, "complaints", Console(stderr=True, force_terminal=True, soft_wrap=True))
    live = score(file)
    assert "8/8" in live.stderr
    assert " of 8 rows" not in live.stderr
    assert live.stdout == lines.stdout
