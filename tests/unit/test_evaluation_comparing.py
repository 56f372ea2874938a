"""Which methods are compared with which, and what comparisons come to, by numbers that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sipo.errors import InvalidRequest
from sipo.evaluation.answers import Answer
from sipo.evaluation.bootstrap import draws, holm
from sipo.evaluation.comparing import LEVEL, MOST_REPORTS, compare, comparisons
from sipo.evaluation.measured import Made, Measure
from sipo.evaluation.report import Comparison, Kind, Verdict
from tests.evaluation import OBJECTIVES, method_of


def made(folder: Path, name: str, means: list[list[float]], kind: Kind = "mod", *, noise: float = 0.0, prompts: int = 40) -> Made:
    """At the weights concise = 0, 1/2 and 1, mean rewards `means` [weights, objectives]; prompts differ by ±`noise` around them."""
    method = method_of(folder, kind, name)
    answers = [
        Answer(prompt=index, weights=point, text="a", tokens=3, finish_reason="stop")
        for index in range(prompts)
        for point in method.points
    ]
    spread = np.where(np.arange(prompts) % 2, noise, -noise)[None, :, None]
    scores = np.array(means, dtype=np.float64)[:, None, :] + spread
    return Made.of(method, answers, scores, 10 * scores - 20, np.empty((*scores.shape[:2], 0)))


def compared(
    methods: list[Made], against: list[str], originals: np.ndarray | None = None
) -> tuple[list[Comparison], list[Verdict]]:
    measure = Measure(np.zeros(2), draws(methods[0].scores.shape[1], samples=50), [one.scores for one in methods])
    pairs = comparisons([one.method.name for one in methods], against)
    return compare(methods, pairs, OBJECTIVES, measure, originals=originals, seed=0)


def test_methods_are_compared_each_with_all_before_it_or_with_those_named() -> None:
    names = ["a", "b", "c"]
    assert list(comparisons(names, [])) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert comparisons(names, ["b"]) == {("a", "b"): [("a", "b")], ("c", "b"): [("c", "b")]}
    assert list(comparisons(names, ["b", "c", "b"])) == [("a", "b"), ("c", "b"), ("a", "c")]
    with pytest.raises(InvalidRequest, match="no method 'd' to compare with: there are a, b, c"):
        comparisons(names, ["d"])


def test_seeds_are_compared_with_the_same_seed_and_with_methods_that_have_none() -> None:
    names = ["base", "mod@1", "mod@2", "sipo@2", "sipo@1", "sipo@3"]
    found = comparisons(names, [])
    assert found["mod", "base"] == [("mod@1", "base"), ("mod@2", "base")]
    assert found["sipo", "mod"] == [("sipo@2", "mod@2"), ("sipo@1", "mod@1")]
    assert list(comparisons(names, ["mod"])) == [("base", "mod"), ("sipo", "mod")]
    with pytest.raises(InvalidRequest, match="no method 'mod@1' to compare with: there are base, mod, sipo"):
        comparisons(names, ["mod@1"])
    with pytest.raises(InvalidRequest, match="b and a have no seed in common"):
        comparisons(["a@1", "b@2"], [])


def test_a_method_wins_where_every_seed_does(tmp_path: Path) -> None:
    low, high = [[0, 2], [1, 1], [2, 0]], [[1, 3], [2, 2], [3, 1]]
    methods = [made(tmp_path, f"low@{seed}", low) for seed in (1, 2)] + [made(tmp_path, f"high@{seed}", high) for seed in (1, 2)]
    found, verdicts = compared(methods, [])
    assert [(one.method, one.against) for one in found] == [("high@1", "low@1"), ("high@2", "low@2")]
    assert verdicts == [Verdict(method="high", against="low", seeds=["1", "2"], verdict="wins")]
    assert compared([*methods[2:], *methods[:2]], [])[1][0].verdict == "loses"
    undecided = [*methods[:3], made(tmp_path, "high@2", low)]
    assert [one.verdict for one in compared(undecided, [])[1]] == ["not decided"]
    alone = [made(tmp_path, "low", low), made(tmp_path, "high", high)]
    assert compared(alone, [])[1] == [Verdict(method="high", against="low", seeds=[], verdict="wins")]


def test_many_comparisons_can_still_be_certain(tmp_path: Path) -> None:
    """With 50 draws the least p value of 6 comparisons, corrected, would be 0.24."""
    methods = [made(tmp_path, f"m{index}", [[index, index]] * 3, noise=0.1, prompts=10) for index in range(1, 5)]
    found, verdicts = compared(methods, [])
    assert [one.verdict for one in verdicts] == ["wins"] * 6
    uncorrected = [one.uncorrected for one in found if one.uncorrected is not None]
    assert [one.p_value for one in found] == holm(uncorrected)
    assert max(holm(uncorrected * MOST_REPORTS)) < LEVEL < max(holm(uncorrected * (MOST_REPORTS + 1)))


def test_improvements_are_told_at_each_weight_and_in_parts_of_the_other(tmp_path: Path) -> None:
    other, better = made(tmp_path, "other", [[1, 3], [2, 2.5], [3, 3]]), made(tmp_path, "better", [[2, 2], [2, 2.5], [4, 5]])
    originals = np.zeros((2, 40, 2))
    originals[:, :, 1] = 2.2
    originals[:, ::2, 0] = 1.5
    ((found,), _) = compared([other, better], [], originals)
    first, second, third = found.improvements
    assert [one.weights for one in found.improvements] == [{"concise": c, "warm": 1 - c} for c in (0.0, 0.5, 1.0)]
    assert {name: one.value for name, one in first.rewards.items()} == {"concise": 1, "warm": -1}
    assert (first.average.value, second.average.value, third.average.value) == (0, 0, 1.5)
    # The judges' own rewards are 10 times these, less 20: from -10 to 0, from 10 to 0; and from 10 to 30.
    assert first.relative == {"concise": 1, "warm": -1}
    assert second.relative == {"concise": None, "warm": 0}
    assert third.relative == {"concise": 1, "warm": 2}
    # other beats the originals in half of the prompts at the first weight, better in none, as 2 < 2.2.
    assert first.dominating is not None
    assert (first.dominating.value, first.relative_dominating) == (-0.5, -1)


def test_a_method_without_weights_is_compared_at_each_weight_of_the_other(tmp_path: Path) -> None:
    base, mod = made(tmp_path, "base", [[1, 1]], "base"), made(tmp_path, "mod", [[0, 4], [2, 2], [4, 0]])
    ((found,), _) = compared([base, mod], [])
    assert [one.average.value for one in found.improvements] == [1, 1, 1]
    ((turned,), _) = compared([mod, base], [])
    assert [one.average.value for one in turned.improvements] == [-1, -1, -1]
    assert [one.weights for one in turned.improvements] == [one.weights for one in found.improvements]
