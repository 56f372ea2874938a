"""Eq. 7 by hand: y_-1 = response_0, y_1 = response_1; rewards by name."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from sipo.conversation import Message
from sipo.preferences import Example
from sipo.selection import (
    CandidateText,
    Chosen,
    Filter,
    Pair,
    Rejection,
    Scored,
    Selection,
    keep_rewrites,
    pareto_pairs,
    screen,
)
from sipo.selection import select as select_for

ORIGINALS = ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0})
EXAMPLE = Example(prompt="x", response_0="y0", response_1="y1", labels={"a": 1, "b": 0})


def select(
    originals: tuple[Mapping[str, float], Mapping[str, float]],
    candidates: Sequence[Scored],
    by: Filter | None = None,
    seed: str = "",
) -> Selection:
    return select_for(EXAMPLE, originals, candidates, by, seed=seed)


def chosen(*candidates: int, objective: str | None = None) -> list[Chosen]:
    return [Chosen(candidate=index, objective=objective) for index in candidates]


def test_the_candidate_above_both_originals_on_every_reward_with_the_largest_average_is_chosen() -> None:
    selection = select(ORIGINALS, [{"a": 1.5, "b": 1.1}, {"a": 1.1, "b": 2.0}, {"a": 9.0, "b": 0.9}])
    assert selection.chosen == chosen(1)  # averages 1.3, 1.55; the third is below y_-1 on b
    assert selection.rejections == [
        Rejection("not_best", "average 1.3000, candidate 1 has 1.5500"),
        None,
        Rejection("worse_than_original", "b -0.1000 against response_0"),
    ]


def test_equal_to_an_original_on_one_reward_is_not_better() -> None:
    selection = select(ORIGINALS, [{"a": 1.0, "b": 5.0}])
    assert selection == Selection([], [Rejection("worse_than_original", "a +0.0000 against response_1")])


def test_the_rejection_names_the_reward_that_falls_furthest_short_of_either_original() -> None:
    (rejection,) = select(ORIGINALS, [{"a": 0.7, "b": 0.2}]).rejections  # a: +0.7, -0.3; b: -0.8, +0.2
    assert str(rejection) == "worse_than_original: b -0.8000 against response_0"


def test_a_rejected_candidate_keeps_its_reason_and_takes_no_part() -> None:
    selection = select(ORIGINALS, [Rejection("truncated"), {"a": 2.0, "b": 2.0}])
    assert selection == Selection(chosen(1), [Rejection("truncated"), None])


def test_no_candidates_choose_nothing() -> None:
    assert select(ORIGINALS, []) == Selection([], [])


def test_of_equal_averages_the_first_is_chosen() -> None:
    assert select(ORIGINALS, [{"a": 2.0, "b": 3.0}, {"a": 3.0, "b": 2.0}]).chosen == chosen(0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_never_ranked(value: float) -> None:
    selection = select(ORIGINALS, [{"a": value, "b": 9.0}, {"a": 2.0, "b": 2.0}])
    assert selection == Selection(chosen(1), [Rejection("not_finite", f"a is {value}"), None])
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
        assert selection.chosen == ([] if best is None else chosen(best))
        assert [index for index, rejection in enumerate(selection.rejections) if rejection is None] == (
            [] if best is None else [best]
        )
        outcomes.add(best)
    assert outcomes > {None, 0, 1, 2}


def test_screening_rejects_truncated_empty_and_duplicate_texts_before_scoring() -> None:
    candidates = [
        CandidateText("new", truncated=True),
        CandidateText(" \n"),
        CandidateText("one "),
        CandidateText("new"),
        CandidateText("new"),
        CandidateText("other"),
    ]
    assert screen(["one", "two"], candidates) == [
        Rejection("truncated"),
        Rejection("empty"),
        Rejection("duplicate", "of response_0"),
        None,
        Rejection("duplicate", "of candidate 3"),
        None,
    ]


def test_a_chosen_response_gives_a_pair_against_each_original_or_for_one_objective_against_the_one_it_prefers() -> None:
    assert pareto_pairs(EXAMPLE, "better") == [Pair("x", "better", "y0"), Pair("x", "better", "y1")]
    same = EXAMPLE.model_copy(update={"response_0": "same", "response_1": "same"})
    assert pareto_pairs(same, "better") == [Pair("x", "better", "same")]
    assert pareto_pairs(EXAMPLE, "better", "a") == [Pair("x", "better", "y1")]
    assert pareto_pairs(EXAMPLE, "better", "b") == [Pair("x", "better", "y0")]
    talk = (Message(role="system", content="be kind"), Message(role="user", content="x"))
    assert pareto_pairs(EXAMPLE.model_copy(update={"prompt": talk}), "better", "b") == [Pair(talk, "better", "y0")]


# Options


def test_a_margin_asks_for_that_much_more_on_every_reward() -> None:
    candidates = [{"a": 1.5, "b": 1.1}, {"a": 1.5, "b": 1.5}]
    assert select(ORIGINALS, candidates, Filter(margin=0.25)) == Selection(
        chosen(1), [Rejection("worse_than_original", "b +0.1000 against response_0, the margin is 0.25"), None]
    )
    assert select(ORIGINALS, candidates, Filter(margin=0.5)).chosen == []  # exactly the margin is not more than it


def test_top_k_chooses_the_best_by_average_in_that_order() -> None:
    candidates = [{"a": 2.0, "b": 2.0}, {"a": 4.0, "b": 2.0}, {"a": 0.0, "b": 9.0}, {"a": 3.0, "b": 2.0}]
    selection = select(ORIGINALS, candidates, Filter(top_k=2))
    assert selection.chosen == chosen(1, 3)
    assert selection.rejections[0] == Rejection("not_best", "average 2.0000, candidate 1 has 3.0000")
    assert select(ORIGINALS, candidates, Filter(top_k=16)).chosen == chosen(1, 3, 0)


def test_without_filter_as_many_are_drawn_as_the_filter_would_choose_from_all_that_were_scored() -> None:
    candidates: list[Scored] = [{"a": 2.0, "b": 2.0}, {"a": 0.0, "b": 0.0}, Rejection("truncated"), {"a": 9.0, "b": 0.5}]
    by = Filter(rule="no_filter")
    drawn = {seed: select(ORIGINALS, candidates, by, seed=str(seed)) for seed in range(60)}
    counts = Counter(one.chosen[0].candidate for one in drawn.values() if len(one.chosen) == 1)
    assert sum(counts.values()) == 60
    assert counts.keys() == {0, 1, 3}
    assert min(counts.values()) >= 10
    assert select(ORIGINALS, candidates, by, seed="7") == drawn[7]
    assert drawn[7].rejections.count(Rejection("not_drawn", "1 of 3 were drawn")) == 2
    assert select(ORIGINALS, candidates[1:], by).chosen == []  # the filter would choose none


def test_separate_responses_are_the_best_for_each_objective_against_the_original_that_it_prefers() -> None:
    originals = ({"a": 5.0, "b": 1.0}, {"a": 1.0, "b": 5.0})  # a prefers response_1, b response_0, whatever the rewards say
    candidates = [{"a": 1.5, "b": 0.0}, {"a": 2.0, "b": 0.5}, {"a": 0.5, "b": 1.5}, {"a": 0.0, "b": 0.0}]
    selection = select(originals, candidates, Filter(rule="separate_responses"))
    assert selection.chosen == [*chosen(1, objective="a"), *chosen(2, objective="b")]
    assert selection.rejections[:3] == [Rejection("not_best", "a 1.5000, candidate 1 has 2.0000"), None, None]
    assert selection.rejections[3] == Rejection("worse_than_original", "a -1.0000 against response_1")
    top = select(originals, candidates, Filter(rule="separate_responses", top_k=2))
    assert top.chosen == [*chosen(1, 0, objective="a"), *chosen(2, objective="b")]


def test_the_published_rule_keeps_a_rewrite_unless_no_policys_reward_is_higher() -> None:
    candidates: list[Scored] = [
        {"a": 1.0, "b": 1.0, "a=0.5,b=0.5": 9.0},
        {"a": 0.0, "b": 1.1, "a=0.5,b=0.5": 0.0},  # one higher reward suffices
        {"a": 1.0, "b": 1.0, "a=0.5,b=0.5": 0.0},
        {"a": 1.0, "b": 0.5, "a=0.5,b=0.5": 9.0},  # none is higher: soups do not count
        Rejection("truncated"),
        {"a": 0.0, "b": 0.0, "a=0.5,b=0.5": 0.0},
    ]
    assert keep_rewrites(candidates, {1: 0, 3: 2, 5: 4}, ["a", "b"]) == [
        Rejection("rewritten", "candidate 1 replaces it"),
        candidates[1],
        candidates[2],
        Rejection("not_improved", "no policy's reward is above that of candidate 2"),
        candidates[4],
        candidates[5],
    ]


def test_truncated_candidates_may_be_kept() -> None:
    candidates = [CandidateText("cut", truncated=True), CandidateText("cut")]
    assert screen(["one", "two"], candidates, keep_truncated=True) == [None, Rejection("duplicate", "of candidate 0")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"implicit": False},
        {"rule": "separate_responses", "reward_models": ["safety"]},
        {"reward_models": ["safety", "safety"]},
        {"margin": -0.1},
        {"margin": math.nan},
        {"top_k": 0},
        {"topk": 2},
    ],
)
def test_filters_that_could_not_decide_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Filter.model_validate(wrong)
