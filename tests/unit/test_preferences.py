from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from sipo.errors import InvalidWeights
from sipo.preferences import (
    Example,
    format_weights,
    normalize_weights,
    one_hot_weights,
    parse_weights,
    sampling_weights,
    uniform_weights,
)

TWO = ["helpful", "harmless"]


def test_weights_come_back_in_the_objectives_order_and_sum_to_exactly_one() -> None:
    weights = normalize_weights({"harmless": 0.3, "helpful": 0.7004}, TWO)
    assert list(weights) == TWO
    assert math.isclose(sum(weights.values()), 1, abs_tol=1e-15)
    assert math.isclose(weights["helpful"], 0.7004 / 1.0004)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"helpful": 1.0}, "no weight for 'harmless'"),
        ({"helpful": 0.5, "harmless": 0.5, "funny": 0.0}, "unknown objective 'funny'"),
        ({"helpful": -0.1, "harmless": 1.1}, "'helpful' is -0.1"),
        ({"helpful": 0.7, "harmless": 0.4}, "sum to 1.1"),
        ({"helpful": math.nan, "harmless": 1.0}, "finite number"),
        ({"helpful": math.inf, "harmless": 1.0}, "finite number"),
        ({"helpful": 10**400, "harmless": 0.0}, "finite number"),
        ({"helpful": True, "harmless": 0.0}, "finite number"),
        ({"helpful": "1", "harmless": 0.0}, "finite number"),
        ({}, "no weight for 'helpful'"),
    ],
)
def test_weights_off_the_simplex_are_refused_with_the_reason(weights: dict[str, float], reason: str) -> None:
    with pytest.raises(InvalidWeights, match=reason) as caught:
        normalize_weights(weights, TWO)
    assert caught.value.param == "preference_weights"
    assert caught.value.status == 400


def test_written_weights_read_back() -> None:
    weights = {"helpful": 0.7, "harmless": 0.3}
    assert parse_weights(format_weights(weights)) == parse_weights(" helpful = 0.7 , harmless=3e-1") == weights


@pytest.mark.parametrize(
    "text", ["", "helpful", "helpful=", "=0.5", "helpful=0.5,helpful=0.5", "helpful=x", "a b=1", "helpful=nan"]
)
def test_unreadable_weights_are_refused(text: str) -> None:
    with pytest.raises(InvalidWeights):
        parse_weights(text)


def test_two_objectives_sample_at_the_papers_four_inner_weights() -> None:
    assert [w["helpful"] for w in sampling_weights(TWO)] == [0.2, 0.4, 0.6, 0.8]
    assert all(math.isclose(sum(w.values()), 1) for w in sampling_weights(TWO))


def test_more_objectives_sample_at_the_centre_and_the_midpoints_of_pairs_up_to_eight() -> None:
    three = sampling_weights(["a", "b", "c"])
    assert three == [
        uniform_weights(["a", "b", "c"]),
        {"a": 0.5, "b": 0.5, "c": 0.0},
        {"a": 0.5, "b": 0.0, "c": 0.5},
        {"a": 0.0, "b": 0.5, "c": 0.5},
    ]
    assert len(sampling_weights(list("abcde"))) == 8


def test_one_hot_weights_are_one_policy() -> None:
    assert one_hot_weights("harmless", TWO) == {"helpful": 0.0, "harmless": 1.0}


def test_an_example_conflicts_if_two_present_labels_differ() -> None:
    example = Example(prompt="p", response_0="a", response_1="b", labels={"x": 0, "y": 1, "z": 1})
    assert example.conflicting()
    assert example.conflicting(["x", "z"])
    assert not example.conflicting(["y", "z"])
    assert not example.conflicting(["x", "unlabelled"])


def test_the_label_names_the_preferred_response() -> None:
    example = Example(prompt="p", response_0="a", response_1="b", labels={"x": 0, "y": 1})
    assert example.chosen_rejected("x") == ("a", "b")
    assert example.chosen_rejected("y") == ("b", "a")


@pytest.mark.parametrize(
    "change", [{"prompt": ""}, {"labels": {}}, {"labels": {"x": 2}}, {"labels": {"a b": 1}}, {"response_0": 3}]
)
def test_a_row_out_of_the_schema_is_no_example(change: dict[str, object]) -> None:
    row: dict[str, object] = {"prompt": "p", "response_0": "a", "response_1": "b", "labels": {"x": 0}}
    with pytest.raises(ValidationError):
        Example.model_validate(row | change)
