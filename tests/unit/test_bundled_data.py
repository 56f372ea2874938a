from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import pytest

from sipo.conversation import as_text
from sipo.datasets import (
    bundled_eval_prompts,
    bundled_examples,
    bundled_on_policy_examples,
    bundled_test_prompts,
    conflict_report,
    read,
)
from sipo.datasets.bundled import BUNDLED_OBJECTIVES, CLEAR
from sipo.errors import InvalidRequest
from sipo.evaluation.ground_truth import REWARDS


def test_the_bundled_splits_share_no_prompt_and_make_the_whole() -> None:
    splits = [bundled_examples("train"), bundled_examples("validation"), bundled_examples("test")]
    prompts = [{example.prompt for example in split} for split in splits]
    assert sum(map(len, splits)) == len(bundled_examples()) == len(set.union(*prompts))
    assert all(len(split) > 20 for split in splits)


def test_the_bundled_labels_are_those_of_the_ground_truth() -> None:
    for example in bundled_examples():
        prompt = as_text(example.prompt)
        scores = {
            name: (REWARDS[name](prompt, example.response_0), REWARDS[name](prompt, example.response_1))
            for name in BUNDLED_OBJECTIVES
        }
        assert example.labels == {name: int(second > first) for name, (first, second) in scores.items()}


def test_between_40_and_60_percent_of_the_bundled_pairs_conflict() -> None:
    examples = bundled_examples()
    assert 0.4 < sum(example.conflicting() for example in examples) / len(examples) < 0.6


def test_position_says_nothing_about_the_bundled_labels() -> None:
    examples = bundled_examples()
    for objective in BUNDLED_OBJECTIVES:
        assert 0.4 < sum(example.labels[objective] for example in examples) / len(examples) < 0.6


def test_a_third_objective_is_labelled_where_its_rewards_differ_clearly() -> None:
    """The figures of sipo/data/bundled/README.md."""
    report = conflict_report(bundled_examples(objectives=list(REWARDS)))
    assert report.labels == {"concise": 385, "warm": 385, "simple": 349}
    assert report.conflicting == 267
    assert [(pair.first, pair.second, pair.conflicting) for pair in report.pairs] == [
        ("concise", "warm", 218),
        ("concise", "simple", 166),
        ("warm", "simple", 129),
    ]


def test_labels_of_a_third_objective_leave_the_two_as_they_are() -> None:
    for two, three in zip(bundled_examples("train"), bundled_examples("train", list(REWARDS)), strict=True):
        rewards = [REWARDS["simple"](as_text(two.prompt), text) for text in (two.response_0, two.response_1)]
        clear = abs(rewards[1] - rewards[0]) >= CLEAR
        wanted = {"simple": int(rewards[1] > rewards[0])} if clear else {}
        assert three == two.model_copy(update={"labels": two.labels | wanted})


def test_a_pair_without_any_label_is_left_out() -> None:
    assert len(bundled_examples(objectives=["simple"])) == 349
    assert [example.labels for example in bundled_examples(objectives=["warm"])] == [
        {"warm": example.labels["warm"]} for example in bundled_examples()
    ]


def test_three_labels_written_as_json_lines_are_read_again(tmp_path: Path) -> None:
    examples = bundled_examples("validation", list(REWARDS))
    file = tmp_path / "three.jsonl"
    file.write_text("".join(f"{example.model_dump_json()}\n" for example in examples), encoding="utf-8")
    assert read(file).labelled() == examples


def test_an_objective_without_a_function_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no objective 'polite': there are concise, warm, simple") as caught:
        bundled_examples(objectives=["warm", "polite"])
    assert caught.value.param == "objectives"


def test_on_policy_pairs_are_of_known_prompts_differ_clearly_and_share_no_answer() -> None:
    """The figures of sipo/data/bundled/README.md."""
    pairs = bundled_on_policy_examples()
    report = conflict_report(pairs)
    assert (report.rows, report.conflicting, len({example.prompt for example in pairs})) == (3781, 1973, 1399)
    answers = [(example.prompt, text) for example in pairs for text in (example.response_0, example.response_1)]
    assert len(set(answers)) == len(answers)
    for example in pairs:
        prompt = as_text(example.prompt)
        differences = {
            name: REWARDS[name](prompt, example.response_1) - REWARDS[name](prompt, example.response_0)
            for name in BUNDLED_OBJECTIVES
        }
        assert min(map(abs, differences.values())) >= CLEAR
        assert example.labels == {name: int(difference > 0) for name, difference in differences.items()}


@pytest.mark.parametrize(("split", "pairs", "conflicting"), [("train", 2971, 954), ("validation", 428, 130), ("test", 382, 113)])
def test_a_prompt_is_in_the_same_split_of_both_files(
    split: Literal["train", "validation", "test"], pairs: int, conflicting: int
) -> None:
    on_policy = bundled_on_policy_examples(split)
    assert len(on_policy) == pairs
    assert len({example.prompt for example in on_policy if example.conflicting()}) == conflicting
    here, everywhere = ({example.prompt for example in bundled_examples(one)} for one in (split, None))
    assert {example.prompt for example in on_policy} & everywhere <= here


def test_the_evaluation_prompts_are_300_others() -> None:
    prompts = bundled_eval_prompts()
    assert len(prompts) == len(set(prompts)) == 300
    assert not set(prompts) & {example.prompt for example in bundled_examples()}


def test_the_test_prompts_are_547_others() -> None:
    prompts = bundled_test_prompts()
    assert len(prompts) == len(set(prompts)) == 547
    trained = [*bundled_examples(), *bundled_on_policy_examples()]
    assert not set(prompts) & {*bundled_eval_prompts(), *(example.prompt for example in trained)}


def test_no_prompt_for_further_training_data_is_one_of_another_file() -> None:
    prompts = (files("sipo") / "data" / "bundled" / "more_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 1056
    others = {*bundled_test_prompts(), *bundled_eval_prompts(), *(example.prompt for example in bundled_examples())}
    assert not set(prompts) & others
