"""Intervals and p values: that they hold the truth as often as they say, on simulated prompts with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sipo.errors import InvalidRequest
from sipo.evaluation.bootstrap import draws, holm, interval, of_means, paired
from sipo.evaluation.indicators import Array, hypervolume

ARC = np.array([[0.1, 0.6], [0.4, 0.5], [0.6, 0.1]])
ALIKE = np.full((3, 2), 0.3)


def volume(points: Array) -> float:
    return hypervolume(points, [0, 0])


def scored(means: Array, prompts: int, rng: np.random.Generator) -> Array:
    """Scores [weights, prompts, objectives] of these means: some prompts are easier than others, for all weights."""
    return means[:, None] + rng.normal(0, 0.2, (1, prompts, 2)) + rng.normal(0, 0.2, (len(means), prompts, 2))


def first(points: Array) -> float:
    return float(points[0, 0])


def test_draws_take_as_many_prompts_as_there_are_and_are_the_same_again() -> None:
    drawn = draws(30, samples=400)
    assert drawn.shape == (400, 30)
    assert (drawn.sum(axis=1) == 30).all()
    assert drawn.mean(axis=0) == pytest.approx(1, abs=0.2)
    assert np.array_equal(drawn, draws(30, samples=400))
    assert not np.array_equal(drawn, draws(30, samples=400, seed=1))


def test_a_draw_measures_the_means_of_the_prompts_it_took() -> None:
    scores = np.arange(24.0).reshape(2, 4, 3)
    drawn = of_means(scores, np.array([[1.0, 1, 1, 1], [0, 0, 4, 0], [3, 1, 0, 0]]), lambda points: float(points[1, 2]))
    assert drawn == pytest.approx([scores[1, :, 2].mean(), scores[1, 2, 2], (3 * scores[1, 0, 2] + scores[1, 1, 2]) / 4])


def test_the_interval_of_a_mean_is_the_one_that_theory_knows() -> None:
    rewards = np.random.default_rng(0).normal(2, 1, (1, 400, 1))
    found = interval(of_means(rewards, draws(400, samples=4000), first), rewards.mean())
    half = 1.96 * rewards.std() / 20
    assert found.value == rewards.mean()
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.01)


def test_an_interval_reflects_the_draws_at_the_value() -> None:
    found = interval(np.linspace(1, 2, 1001), 1.2)
    assert [found.low, found.high] == pytest.approx([2.4 - 1.975, 2.4 - 1.025], abs=0.001)


# Three points that are alike are the hard case: chance alone makes steps of them. Quantiles without reflection hold the truth there
# in 76 to 80 %.
@pytest.mark.parametrize(("means", "least"), [(ARC, 0.9), (ALIKE, 0.85)])
def test_the_interval_of_a_hypervolume_holds_the_truth(means: Array, least: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        scores = scored(means, 100, rng)
        found = interval(of_means(scores, draws(100, samples=150, seed=seed), volume), volume(scores.mean(axis=1)))
        held += found.low <= volume(means) <= found.high
    assert least <= held / 200 <= 0.99


def test_no_difference_is_seldom_taken_for_one_and_a_real_one_is_found() -> None:
    rng = np.random.default_rng(0)
    drawn = draws(60, samples=200)
    pairs = [(scored(ARC, 60, rng), scored(ARC, 60, rng)) for _ in range(50)]
    assert sum(paired(a, b, drawn, volume)[1] < 0.05 for a, b in pairs) <= 5
    assert all(paired(a + 0.3, b, drawn, volume)[1] < 0.05 for a, b in pairs[:10])


def test_a_p_value_of_at_most_5_percent_is_an_interval_without_0() -> None:
    rng = np.random.default_rng(0)
    drawn = draws(50, samples=199)
    for step in np.linspace(-0.1, 0.1, 21):
        found, p_value = paired(scored(ARC + step, 50, rng), scored(ARC, 50, rng), drawn, volume)
        assert (p_value <= 0.05) == (not found.low <= 0 <= found.high)


def test_pairing_takes_off_what_the_prompts_themselves_vary() -> None:
    a = np.random.default_rng(0).normal(0, 5, (1, 50, 2))
    found, p_value = paired(a + 0.1, a, draws(50), first)
    assert [found.value, found.low, found.high] == pytest.approx([0.1, 0.1, 0.1])
    assert p_value == 2 / 2001
    back, p_value = paired(a, a + 0.1, draws(50), first)
    assert back.value == pytest.approx(-0.1)
    assert p_value == 2 / 2001


def test_the_same_answers_in_another_order_are_no_difference() -> None:
    a = scored(np.vstack([ARC, ARC / 3]), 50, np.random.default_rng(0))
    found, p_value = paired(a, a[::-1], draws(50), lambda points: float(points[:, 0].sum()))
    assert (found.value, found.low, found.high, p_value) == (0, 0, 0, 1)


def test_holm_corrects_the_least_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("call", "param", "message"),
    [
        (lambda: draws(1), "prompts", "at least 2 prompts: there are 1"),
        (lambda: draws(5, samples=0), "samples", "at least 1, not 0"),
        (lambda: of_means(np.zeros((2, 4, 2)), draws(5), volume), "draws", "draws are of 5 prompts, scores of 4"),
        (lambda: of_means(np.zeros((4, 2)), draws(4), volume), "scores", r"\[weights, prompts, objectives\]"),
        (lambda: of_means(np.full((1, 4, 2), np.nan), draws(4), volume), "scores", r"scores\[0, 0, 0\] is nan"),
        (lambda: paired(np.zeros((2, 4, 2)), np.zeros((2, 4, 3)), draws(4), volume), "scores_b", "same prompts and objectives"),
        (lambda: interval([1, float("nan")], 1), "drawn", r"drawn\[1\] is nan"),
        (lambda: holm([0.5, float("nan")]), "p_values", r"p_values\[1\] is nan"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Callable[[], object], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        call()
    assert refused.value.param == param
