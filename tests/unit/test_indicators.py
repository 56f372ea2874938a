"""Indicators against values worked by hand, against slower ways to the same number, and by what must hold of any points."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sipo.errors import InvalidRequest
from sipo.evaluation.indicators import (
    Array,
    agreement,
    got_shares,
    hypervolume,
    igd_plus,
    inner_product,
    length_controlled,
    miscalibration,
    monotonicity,
    nondominated,
    spread,
    standardise,
)

STAIRS = np.array([[1, 3], [2, 2], [3, 1]])

RAGGED: Any = [[1, 2], [1]]
PATIENT = settings(deadline=None, max_examples=50)  # the first example imports moocore


@st.composite
def point_sets(draw: st.DrawFn) -> Array:
    """Between one and six points of two to eight objectives on a coarse grid, so that equal values and points below 0 occur."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(2, 8)))
    return draw(arrays(np.int64, shape, elements=st.integers(-1, 4))).astype(np.float64)


def by_inclusion_exclusion(points: Array) -> float:
    """The volume of a union of boxes from 0, one to each point, by the volumes of their intersections."""
    boxes = points.clip(min=0)
    groups = [list(group) for size in range(1, len(boxes) + 1) for group in combinations(range(len(boxes)), size)]
    return float(sum((-1) ** (len(group) + 1) * boxes[group].min(axis=0).prod() for group in groups))


def dominated_or_equal(points: Array, index: int) -> bool:
    """Whether another point is at least as good everywhere: a better one, or an equal one that comes first."""
    at_least = (points >= points[index]).all(axis=1)
    equal = (points == points[index]).all(axis=1)
    return bool((at_least & ~equal).any() or equal[:index].any())


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        (STAIRS, [0, 0], 6),
        (STAIRS, [1, 1], 1),  # two of them lie on the reference, and add nothing
        ([[1, 1]], [0, 0], 1),
        ([[0, 5], [5, 0]], [0, 0], 0),
        ([[-1, 5], [-2, -2]], [0, 0], 0),
        ([[-1, 5], [2, 2]], [0, 0], 4),
        ([[1, 2], [1, 2], [0, 1]], [-1, 0], 4),
        ([[1, 1, 2], [2, 1, 1]], [0, 0, 0], 3),
        ([[2] * 8], [0] * 8, 256),
    ],
)
def test_hypervolume_is_the_volume_above_the_reference(points: Any, reference: Any, volume: float) -> None:
    assert hypervolume(points, reference) == pytest.approx(volume)


@PATIENT
@given(point_sets())
def test_hypervolume_is_that_of_a_union_of_boxes(points: Array) -> None:
    assert hypervolume(points, np.zeros(points.shape[1])) == pytest.approx(by_inclusion_exclusion(points))


@PATIENT
@given(point_sets(), st.data())
def test_a_further_point_never_lowers_the_hypervolume_and_a_dominated_one_leaves_it(points: Array, data: st.DataObject) -> None:
    reference = np.zeros(points.shape[1])
    further = data.draw(arrays(np.float64, points.shape[1], elements=st.floats(-1, 5)))
    volume = hypervolume(points, reference)
    assert hypervolume([*points, further], reference) >= volume - 1e-9 * abs(volume)
    assert hypervolume([*points, np.minimum(points[0], further)], reference) == pytest.approx(volume)


@PATIENT
@given(point_sets())
def test_the_front_is_what_nothing_dominates_and_has_all_of_the_hypervolume(points: Array) -> None:
    front = nondominated(points)
    assert front == [index for index in range(len(points)) if not dominated_or_equal(points, index)]
    reference = np.zeros(points.shape[1])
    assert hypervolume(points[front], reference) == pytest.approx(hypervolume(points, reference))
    assert igd_plus(points, points[front]) == 0


def test_igd_plus_counts_only_what_is_worse() -> None:
    # (3, 0) misses (1, 3) by 3 and (3, 1) by 1; that it is 2 better than (1, 3) on the first objective does not count.
    assert igd_plus([[3, 0]], [[1, 3], [3, 1]]) == pytest.approx((3 + 1) / 2)
    assert igd_plus([[0, 0, 0]], [[1, 2, 2]]) == pytest.approx(3)
    assert igd_plus([[4, 4]], STAIRS) == 0


def test_inner_product_and_spread() -> None:
    weights = np.array([[1, 0], [0.5, 0.5], [0, 1]])
    assert inner_product(STAIRS, weights) == pytest.approx((1 + 2 + 1) / 3)
    assert spread(STAIRS).tolist() == [2, 2]


def test_standardised_scores_of_the_base_have_mean_0_and_deviation_1() -> None:
    base = np.random.default_rng(0).normal([3, -1], [2, 0.5], size=(50, 2))
    standardised = standardise(base, base.mean(axis=0), base.std(axis=0))
    assert standardised.mean(axis=0) == pytest.approx([0, 0])
    assert standardised.std(axis=0) == pytest.approx([1, 1])
    assert standardise([[[5, 0]]], [3, -1], [2, 0.5]).tolist() == [[[1, 2]]]


def test_length_control_takes_off_what_length_explains_and_nothing_else() -> None:
    tokens = np.array([10, 20, 30, 40])
    quality = np.array([1, -1, -1, 1])  # unrelated to length
    assert length_controlled(quality + 0.1 * tokens, tokens) == pytest.approx(quality + 2.5)
    assert length_controlled(quality + 0.1 * tokens, tokens, at=10) == pytest.approx(quality + 1)
    assert length_controlled([1, 2], [7, 7], at=20).tolist() == [1, 2]


def test_agreement_is_the_share_of_pairs_ordered_alike() -> None:
    judge = np.random.default_rng(0).normal(size=(20, 4))
    assert agreement(judge, 2 * judge + 5) == 1
    assert agreement(judge, -judge) == 0
    assert agreement(judge, np.zeros_like(judge)) == 0.5
    assert agreement([[1, 2, 3]], [[1, 3, 2]]) == pytest.approx(2 / 3)
    # Only answers to the same prompt are compared: that the second prompt's are all better to b alone is no matter.
    assert agreement([[1, 2], [1, 2]], [[1, 2], [8, 9]]) == 1
    assert agreement([[1, 1]], [[2, 2]]) == 1


@pytest.mark.parametrize(
    ("call", "param", "message"),
    [
        (
            lambda: hypervolume([[1.0, 2.0], [float("nan"), 2.0]], [0, 0]),
            "points",
            r"points\[1, 0\] is nan: it must be a finite number",
        ),
        (lambda: hypervolume(STAIRS, [0, float("inf")]), "reference", r"reference\[1\] is inf"),
        (lambda: hypervolume(STAIRS, [0, 0, 0]), "reference", "reference has 3 objectives, the rewards have 2"),
        (lambda: hypervolume([1, 2], [0, 0]), "points", r"\[points, objectives\].*: this one is \[2\]"),
        (lambda: hypervolume(RAGGED, [0, 0]), "points", r"points must be numbers in an array \[points, objectives\]"),
        (lambda: nondominated(np.zeros((0, 2))), "points", "none of its axes empty"),
        (lambda: igd_plus(STAIRS, [[1, 2, 3]]), "front", "front has 3 objectives"),
        (lambda: inner_product(STAIRS, [[1, 0]]), "weights", r"the shape of points, \[3, 2\], and have \[1, 2\]"),
        (lambda: standardise(STAIRS, [0, 0], [1, 0]), "std", r"std\[1\] is 0"),
        (lambda: standardise([[[1.0, float("nan")]]], [0, 0], [1, 1]), "scores", r"scores\[0, 0, 1\] is nan"),
        (lambda: length_controlled([1, 2], [5]), "tokens", "one to each of 2 rewards, not 1"),
        (lambda: length_controlled([1, 2], [5, 6], at=float("nan")), "at", "at is nan"),
        (lambda: agreement([[1, 2]], [[1, 2], [3, 4]]), "b", r"not \[1, 2\] and \[2, 2\]"),
        (lambda: agreement([[1], [2]], [[1], [2]]), "a", "at least two answers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Callable[[], object], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        call()
    assert refused.value.param == param


def test_what_a_weight_got_is_its_place_between_least_and_greatest() -> None:
    points = [[0, 30], [1, 20], [4, 10]]
    weights = [[0, 1], [0.5, 0.5], [1, 0]]
    # The middle has 1/4 of the first objective's width and 1/2 of the second's.
    assert got_shares(points) == pytest.approx(np.array([[0, 1], [1 / 3, 2 / 3], [1, 0]]))
    assert miscalibration(points, weights) == pytest.approx(2 * (1 / 6) / 6)
    assert got_shares([[1, 5], [1, 7]]) == pytest.approx(np.array([[0.5, 0.5], [0, 1]]))  # the first got least of all there is
    with pytest.raises(InvalidRequest, match="weights must have the shape of points"):
        miscalibration(points, weights[:2])


def test_monotonicity_is_the_correlation_of_ranks() -> None:
    assert monotonicity([0, 0.2, 0.4, 1], [1, 2, 4, 100]) == pytest.approx(1)
    assert monotonicity([0, 0.2, 0.4, 1], [9, 8, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2, 3, 4 and 2, 1, 3.5, 3.5: Pearson's correlation of those.
    assert monotonicity([0, 1, 2, 3], [5, 4, 7, 7]) == pytest.approx(np.corrcoef([1, 2, 3, 4], [2, 1, 3.5, 3.5])[0, 1])
    assert monotonicity([0, 1], [3, 3]) is None
    with pytest.raises(InvalidRequest, match="one to each of 2 asked, not 3"):
        monotonicity([0, 1], [1, 2, 3])
