from __future__ import annotations

from sipo.conversation import as_text
from sipo.datasets import bundled_eval_prompts, bundled_examples
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
            name: (reward(prompt, example.response_0), reward(prompt, example.response_1)) for name, reward in REWARDS.items()
        }
        assert example.labels == {name: int(second > first) for name, (first, second) in scores.items()}


def test_between_40_and_60_percent_of_the_bundled_pairs_conflict() -> None:
    examples = bundled_examples()
    assert 0.4 < sum(example.conflicting() for example in examples) / len(examples) < 0.6


def test_position_says_nothing_about_the_bundled_labels() -> None:
    examples = bundled_examples()
    for objective in REWARDS:
        assert 0.4 < sum(example.labels[objective] for example in examples) / len(examples) < 0.6


def test_the_evaluation_prompts_are_300_others() -> None:
    prompts = bundled_eval_prompts()
    assert len(prompts) == len(set(prompts)) == 300
    assert not set(prompts) & {example.prompt for example in bundled_examples()}
