"""Eq. 7 by hand: y_-1 = response_0, y_1 = response_1; rewards by name."""

from __future__ import annotations

import math
import random

import pytest

from sipo.selection import Pair, Rejection, Response, Selection, pareto_pairs, screen, select

ORIGINALS = ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0})


def test_the_candidate_above_both_originals_on_every_reward_with_the_largest_average_is_chosen() -> None:
    selection = select(ORIGINALS, [{"a": 1.5, "b": 1.1}, {"a": 1.1, "b": 2.0}, {"a": 9.0, "b": 0.9}])
    assert selection.chosen == 1  # averages 1.3, 1.55; the third is below y_-1 on b
    assert selection.rejections == [
        Rejection("not_best", "average 1.3000, candidate 1 has 1.5500"),
        None,
        Rejection("worse_than_original", "b -0.1000 against response_0"),
    ]


def test_equal_to_an_original_on_one_reward_is_not_better() -> None:
    selection = select(ORIGINALS, [{"a": 1.0, "b": 5.0}])
    assert selection == Selection(None, [Rejection("worse_than_original", "a +0.0000 against response_1")])


def test_the_rejection_names_the_reward_that_falls_furthest_short_of_either_original() -> None:
    (rejection,) = select(ORIGINALS, [{"a": 0.7, "b": 0.2}]).rejections  # a: +0.7, -0.3; b: -0.8, +0.2
    assert str(rejection) == "worse_than_original: b -0.8000 against response_0"


def test_a_rejected_candidate_keeps_its_reason_and_takes_no_part() -> None:
    selection = select(ORIGINALS, [Rejection("truncated"), {"a": 2.0, "b": 2.0}])
    assert selection == Selection(1, [Rejection("truncated"), None])


def test_no_candidates_choose_nothing() -> None:
    assert select(ORIGINALS, []) == Selection(None, [])


def test_of_equal_averages_the_first_is_chosen() -> None:
    assert select(ORIGINALS, [{"a": 2.0, "b": 3.0}, {"a": 3.0, "b": 2.0}]).chosen == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_never_ranked(value: float) -> None:
    selection = select(ORIGINALS, [{"a": value, "b": 9.0}, {"a": 2.0, "b": 2.0}])
    assert selection == Selection(1, [Rejection("not_finite", f"a is {value}"), None])
    with pytest.raises(ValueError, match="reward 'b' of response_1"):
        select((ORIGINALS[0], {"a": 0.0, "b": value}), [{"a": 2.0, "b": 2.0}])


def test_rewards_of_other_models_than_the_originals_are_refused() -> None:
    with pytest.raises(ValueError, match="different models"):
        select(ORIGINALS, [{"a": 2.0}])


def test_selection_agrees_with_brute_force_on_random_vectors() -> None:
    drawn = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        names = [f"r{index}" for index in range(drawn.randint(1, 4))]
        # Few values, so that ties with originals and among candidates happen often.
        vectors = [{name: drawn.randrange(4) / 4 for name in names} for _ in range(2 + drawn.randint(0, 6))]
        (first, second, *candidates) = vectors
        best = None
        for index, candidate in enumerate(candidates):
            better = all(candidate[name] > first[name] and candidate[name] > second[name] for name in names)
            if better and (best is None or sum(candidate.values()) > sum(candidates[best].values())):
                best = index
        selection = select((first, second), candidates)
        assert selection.chosen == best
        assert [index for index, rejection in enumerate(selection.rejections) if rejection is None] == (
            [] if best is None else [best]
        )
        outcomes.add(best)
    assert outcomes > {None, 0, 1, 2}


def test_screening_rejects_truncated_empty_and_duplicate_texts_before_scoring() -> None:
    candidates = [
        Response("new", truncated=True),
        Response(" \n"),
        Response("one "),
        Response("new"),
        Response("new"),
        Response("other"),
    ]
    assert screen(["one", "two"], candidates) == [
        Rejection("truncated"),
        Rejection("empty"),
        Rejection("duplicate", "of response_0"),
        None,
        Rejection("duplicate", "of candidate 3"),
        None,
    ]


def test_an_accepted_prompt_gives_a_pair_against_each_original() -> None:
    assert pareto_pairs("x", "better", ("y0", "y1")) == [Pair("x", "better", "y0"), Pair("x", "better", "y1")]
    assert pareto_pairs("x", "better", ("same", "same")) == [Pair("x", "better", "same")]
