"""How sure a measure of mean rewards is: the bootstrap over prompts, the same draws of prompts for all methods and weights.

Prompts alone are drawn. How a method varies from one training to another is another question, which only several seeds answer, each
with its own interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sipo.errors import InvalidRequest
from sipo.evaluation.indicators import Array, checked
from sipo.evaluation.report import Interval

Statistic = Callable[[Array], float]
"""A measure of the means [weights, objectives] of one method."""


def draws(prompts: int, samples: int = 2000, seed: int = 0) -> Array:
    """How often each draw of as many prompts, with replacement, takes each prompt: counts [samples, prompts].

    Raises InvalidRequest for fewer than two prompts, which have no spread, and for no samples.
    """
    if prompts < 2:
        raise InvalidRequest(f"an interval needs at least 2 prompts: there are {prompts}", param="prompts")
    if samples < 1:
        raise InvalidRequest(f"samples must be at least 1, not {samples}", param="samples")
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=samples)
    return counts.astype(np.float64)  # a matrix product of integers would be slow


def of_means(scores: ArrayLike, draws: Array, statistic: Statistic) -> Array:
    """The statistic of each draw [samples], for `scores` [weights, prompts, objectives] and `draws` of as many prompts.

    To measure several methods together (their common front, for example), put their scores together along the weights.
    Raises InvalidRequest for shapes that do not fit and scores that are not finite.
    """
    scores = checked("scores", scores, "weights", "prompts", "objectives")
    if draws.shape[-1] != scores.shape[1]:
        raise InvalidRequest(f"draws are of {draws.shape[-1]} prompts, scores of {scores.shape[1]}", param="draws")
    means = draws @ scores / scores.shape[1]  # [weights, samples, objectives]
    return np.array([statistic(points) for points in means.swapaxes(0, 1)], dtype=np.float64)


def interval(drawn: ArrayLike, value: float) -> Interval:
    """The 95 % interval of a statistic by its values in all draws, `drawn` [samples], and its `value` on the prompts themselves.

    The draws' quantiles, reflected at the value (the basic bootstrap). Chance makes a hypervolume greater than it is, in the draws
    once more than in the value, which the quantiles themselves would add and this takes off. It matters where points lie close
    together: in simulations of six equal points the quantiles held the truth in 1 to 50 % of cases, these ends in 80 to 95 %, and
    with points that lie apart both in 95 %. An end may lie a little beyond what is possible: a hypervolume below 0, for one.
    """
    drawn = checked("drawn", drawn, "samples")
    value = float(checked("value", value))
    low, high = np.quantile(drawn, [0.025, 0.975], method="weibull")  # which counts as the p value of paired does
    return Interval(value=value, low=float(2 * value - high), high=float(2 * value - low))


def paired(scores_a: ArrayLike, scores_b: ArrayLike, draws: Array, statistic: Statistic) -> tuple[Interval, float]:
    """The statistic of a less that of b, on the same draws of the same prompts, and the two-sided p value of no difference.

    `scores_a` and `scores_b` are [weights, prompts, objectives], and should be of equally many weights, since chance adds to a
    hypervolume with each. The p value belongs to the interval, and is at most 0.05 where 0 lies outside: with d the difference on
    the prompts themselves and d* that of a draw, it is twice the rarer of d* ≥ 2d and d* ≤ 2d, either counted as
    (1 + count) / (samples + 1), and at most 1. So the least that can come out is 2 / (samples + 1).
    Raises InvalidRequest for shapes that do not fit and scores that are not finite.
    """
    scores_a = checked("scores_a", scores_a, "weights", "prompts", "objectives")
    scores_b = checked("scores_b", scores_b, "weights", "prompts", "objectives")
    if scores_a.shape[1:] != scores_b.shape[1:]:
        raise InvalidRequest(
            "scores_a and scores_b must be of the same prompts and objectives: "
            f"they are {list(scores_a.shape)} and {list(scores_b.shape)}",
            param="scores_b",
        )
    return difference(drawn(scores_a, draws, statistic), drawn(scores_b, draws, statistic))


@dataclass(frozen=True)
class Drawn:
    """A statistic on the prompts themselves, and in each draw [samples]."""

    value: float
    draws: Array


def drawn(scores: ArrayLike, draws: Array, statistic: Statistic) -> Drawn:
    """Of `scores` [weights, prompts, objectives], as of_means."""
    scores = checked("scores", scores, "weights", "prompts", "objectives")
    return Drawn(statistic(scores.mean(axis=1)), of_means(scores, draws, statistic))


def difference(a: Drawn, b: Drawn) -> tuple[Interval, float]:
    """As `paired`, of statistics that were drawn alike."""
    draws = _difference(a.draws, b.draws)
    value = float(_difference(a.value, b.value))
    rarer = int(min((draws >= 2 * value).sum(), (draws <= 2 * value).sum()))
    return interval(draws, value), min(1.0, 2 * (1 + rarer) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several comparisons, corrected by Holm's method, in their order: those of at most 0.05 hold together at 5 %.

    Raises InvalidRequest for one that is no probability.
    """
    for index, p_value in enumerate(p_values):
        if not 0 <= p_value <= 1:
            raise InvalidRequest(f"p_values[{index}] is {p_value}: it must lie between 0 and 1", param="p_values")
    corrected = [0.0] * len(p_values)
    greatest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = greatest
    return corrected


def _difference(a: ArrayLike, b: ArrayLike) -> Array:
    # The same answers summed in another order differ in their last digits: that would pass for a difference of all draws.
    return np.where(np.isclose(a, b, rtol=1e-9, atol=0), 0.0, np.subtract(a, b))
