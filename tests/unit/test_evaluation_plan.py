"""What an evaluation is asked: prompts of any data, weights, judges; and what cannot be asked."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from sipo.conversation import Message
from sipo.errors import InvalidData, InvalidRequest, InvalidWeights
from sipo.evaluation.plan import Plan, points_of, read_addresses, read_judges, shown, unseen_of
from sipo.evaluation.prompts import TestPrompt, check_unseen, read_prompts
from tests.evaluation import JUDGES, OBJECTIVES, method_of, plan_of

LABELLED = {"prompt": "Hi", "response_0": "a", "response_1": "b", "labels": {"warm": 1}, "split": "test"}


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "\ufeffHi\n\n Why? \r\n".encode(), [TestPrompt(prompt="Hi"), TestPrompt(prompt="Why?")]),
        ("p.jsonl", lines({"prompt": "Hi"}, {"prompt": "Why?", "id": 7}), [TestPrompt(prompt="Hi"), TestPrompt(prompt="Why?")]),
        ("p.jsonl.gz", gzip.compress(lines({"prompt": "Hi"})), [TestPrompt(prompt="Hi")]),
        ("p.csv", b"prompt,topic\nHi,x\n", [TestPrompt(prompt="Hi")]),
        (
            "p.json",
            json.dumps([{"prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]}]).encode(),
            [TestPrompt(prompt=(Message(role="system", content="Be."), Message(role="user", content="Hi")))],
        ),
        ("labelled.jsonl", lines(LABELLED), [TestPrompt(prompt="Hi", originals=("a", "b"))]),
        ("pairs.jsonl", lines({"prompt": "Hi", "chosen": "a", "rejected": "b"}), [TestPrompt(prompt="Hi")]),
        ("answers.jsonl", lines({"prompt": "Hi", "responses": ["a"]}), [TestPrompt(prompt="Hi")]),
        ("twice.jsonl", lines({"prompt": "b"}, {"prompt": "a"}, {"prompt": "b"}), [TestPrompt(prompt="b"), TestPrompt(prompt="a")]),
    ],
    ids=["lines", "rows", "gzipped", "table", "conversation", "labelled", "pairs", "answers", "twice"],
)
def test_prompts_are_read_of_any_data(tmp_path: Path, name: str, content: bytes, prompts: list[TestPrompt]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"\n", "empty"),
        ("p.txt", b"caf\xe9", "UTF-8"),
        ("p.jsonl", b"", "empty"),
        ("p.jsonl", lines({"prompt": "Hi"}, {"prompt": "  "}), "line 2: `prompt`"),
        ("p.jsonl", lines({"prompt": "Hi"}, {}), "line 2: `prompt` is missing"),
        ("p.jsonl", lines({"question": "Hi"}), "line 1: the columns 'question'"),
    ],
    ids=["no line", "not UTF-8", "no row", "blank", "missing", "another column"],
)
def test_a_bad_file_of_prompts_is_told(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=words):
        read_prompts(tmp_path / name)


def test_prompts_that_were_trained_on_are_counted_however_they_are_spaced() -> None:
    prompts = [TestPrompt(prompt=text) for text in ("Hi  there", "Why?", "Who?")]
    check_unseen(prompts, ["Where?"], "train.jsonl")
    with pytest.raises(InvalidRequest, match=r"2 of 3 test prompts are in the training data train.jsonl, such as 'Hi  there'"):
        check_unseen(prompts, ["hi there\n", "WHY?", "other"], "train.jsonl")


def test_two_objectives_have_an_even_grid_and_more_their_vertices_and_midpoints() -> None:
    assert points_of(OBJECTIVES, []) == [{"concise": step / 5, "warm": (5 - step) / 5} for step in range(6)]
    assert points_of(OBJECTIVES, ["3"]) == [{"concise": c, "warm": 1 - c} for c in (0.0, 0.5, 1.0)]
    assert points_of(OBJECTIVES, ["warm=0.7,concise=0.3", "concise=1,warm=0"]) == [
        {"concise": 0.3, "warm": 0.7},
        {"concise": 1.0, "warm": 0.0},
    ]
    points = [tuple(point.values()) for point in points_of(["a", "b", "c"], [])]
    assert points[:4] == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 / 3, 1 / 3, 1 / 3)]
    assert sorted(points[4:]) == [(0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]


@pytest.mark.parametrize(
    ("objectives", "texts", "words"),
    [
        (OBJECTIVES, ["1"], "2 weights or more"),
        (["a", "b", "c"], ["6"], "a number of weights is for two objectives"),
        (OBJECTIVES, ["concise=0.5"], "no weight for 'warm'"),
        (OBJECTIVES, ["concise=0.5,warm=0.5", "warm=0.5,concise=0.5"], "given twice"),
        (OBJECTIVES, ["6", "7"], "cannot read '6'"),
    ],
)
def test_weights_that_make_no_front_are_refused(objectives: list[str], texts: list[str], words: str) -> None:
    with pytest.raises((InvalidRequest, InvalidWeights), match=words):
        points_of(objectives, texts)


def test_judges_name_the_objectives_in_order() -> None:
    assert list(read_judges(["warm=python:warm", "concise=http://host/score?key=a=b"]).items()) == [
        ("warm", "python:warm"),
        ("concise", "http://host/score?key=a=b"),
    ]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["concise"], "write OBJECTIVE=ADDRESS"),
        (["concise=python:concise"], "two objectives or more"),
        (["a=python:concise", "a=python:warm"], "'a' has two judges"),
        (["mod=python:concise", "a=python:warm"], "'mod' cannot be an objective's name"),
    ],
)
def test_judges_that_cannot_be_read_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_judges(texts)


def test_an_addresss_secrets_are_not_shown() -> None:
    assert shown("https://user:word@host/score?key=secret") == "https://host/score"
    assert shown("hf:org/model#good") == "hf:org/model#good"


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    mod = method_of(tmp_path, "mod")
    with pytest.raises(InvalidRequest, match="2 prompts or more: there are 1"):
        plan_of([mod], prompts=1)
    with pytest.raises(InvalidRequest, match="name a method"):
        plan_of([])
    with pytest.raises(InvalidRequest, match="two methods are called 'mod'"):
        plan_of([mod, mod])
    with pytest.raises(InvalidRequest, match=r"the rewards of warm are counted from the base's.*add base to the methods"):
        plan_of([mod], judges={**JUDGES, "warm": "http://host/score"})


def test_a_plan_is_the_same_wherever_its_files_lie_and_another_with_other_adapters(tmp_path: Path) -> None:
    def identity(adapters: str, folder: Path = tmp_path) -> dict[str, object]:
        method = method_of(folder, "soup", adapters=adapters)
        return plan_of([method]).identity()

    assert identity("demo", tmp_path / "elsewhere") == identity("demo")
    assert identity("other") != identity("demo")
    plan: Plan = plan_of([method_of(tmp_path, "base")])
    assert replace(plan, name="another").identity() == plan.identity()
    assert replace(plan, max_tokens=9).identity() != plan.identity()


def test_unseen_weights_lie_between_those_that_are_measured() -> None:
    seen = points_of(OBJECTIVES, [])
    assert [point["concise"] for point in unseen_of(OBJECTIVES, ["5"], seen)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert unseen_of(["a", "b", "c"], ["a=0.5,b=0.25,c=0.25"], points_of(["a", "b", "c"], [])) == [{"a": 0.5, "b": 0.25, "c": 0.25}]
    with pytest.raises(InvalidRequest, match=r"the weights concise=0.5,warm=0.5 are not unseen"):
        unseen_of(OBJECTIVES, ["1"], points_of(OBJECTIVES, ["3"]))
    with pytest.raises(InvalidRequest, match="1 or more, is for two objectives"):
        unseen_of(["a", "b", "c"], ["5"], [])
    with pytest.raises(InvalidRequest, match="given twice"):
        unseen_of(OBJECTIVES, ["concise=0.5,warm=0.5", "warm=0.5,concise=0.5"], [])


def test_seeds_judges_and_validation_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, mod = method_of(tmp_path, "base"), method_of(tmp_path, "mod")
    with pytest.raises(InvalidRequest, match="'mod' is there with a seed and without"):
        plan_of([mod, method_of(tmp_path, "mod", "mod@1")])
    plan = plan_of([base, mod], judges={**JUDGES, "warm": "http://host/score"})
    with pytest.raises(InvalidRequest, match="'warm' is an objective already"):
        replace(plan, also={"warm": "python:warm"})
    with pytest.raises(InvalidRequest, match=r"1 of 4 test prompts is among the prompts to standardise on, such as 'What is 2\?'"):
        replace(plan, validation=[TestPrompt(prompt="what  is 2?"), TestPrompt(prompt="Else")])
    with pytest.raises(InvalidRequest, match="one validation prompt has no standard deviation"):
        replace(plan, validation=[TestPrompt(prompt="Else")])
    with pytest.raises(InvalidRequest, match="every judge is a function, whose rewards count as they are"):
        replace(plan_of([base]), validation=[TestPrompt(prompt="Else"), TestPrompt(prompt="More")])
    with pytest.raises(InvalidRequest, match="cannot be an objective's name"):
        read_addresses(["mod=python:warm"], "also")


def test_further_judges_belong_to_a_plan_and_the_rest_of_a_report_does_not(tmp_path: Path) -> None:
    plan = plan_of([method_of(tmp_path, "base")], judges={**JUDGES, "warm": "http://host/score"})
    assert replace(plan, also={"simple": "python:simple"}).identity() != plan.identity()
    assert replace(plan, validation=[TestPrompt(prompt="Else"), TestPrompt(prompt="More")]).identity() == plan.identity()
