"""Mistakes in a record, told by field, value and what would be right."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.common.contract.jobs import JobSpec
from sipo.validation import explain


@pytest.mark.parametrize(
    ("fields", "path", "sentence"),
    [
        ({}, "policy", "`policy` is missing"),
        ({"polcy": "x"}, "polcy", "`polcy` is no known field: did you mean `policy`?"),
        ({"policy": "x", "training": {"epoch": 1}}, "training.epoch", "`training.epoch` is no known field: did you mean `epochs`?"),
        ({"policy": "X!"}, "policy", '`policy` must be a text of the form ^[a-z0-9][a-z0-9_-]{0,62}$, not "X!"'),
        ({"policy": "x", "rounds": 0}, "rounds", "`rounds` must be 1 or more, not 0"),
        ({"policy": "x", "rounds": 17}, "rounds", "`rounds` must be 16 or less, not 17"),
        ({"policy": "x", "rounds": "two"}, "rounds", '`rounds` must be a whole number, not "two"'),
        ({"policy": "x", "refine": "maybe"}, "refine", '`refine` must be true or false, not "maybe"'),
        ({"policy": "x", "temperature": None}, "temperature", "`temperature` must be a number, not null"),
        (
            {"policy": "x", "examples": "some"},
            "examples",
            "`examples` must be 'conflicting', 'all' or 'non_conflicting', not \"some\"",
        ),
        ({"policy": "x", "objectives": ["a"]}, "objectives", '`objectives` must have at least 2 items, not ["a"]'),
        ({"policy": "x", "weights": []}, "weights", "`weights` must not be empty, not []"),
        ({"policy": "x", "weights": [{"a": "b"}]}, "weights.0.a", '`weights.0.a` must be a number, not "b"'),
        ([], "", "it must be a mapping of names to values, not []"),
    ],
)
def test_a_mistake_is_told_in_words(fields: Any, path: str, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(fields)
    assert explain(caught.value, JobSpec) == (path, sentence)


def test_what_is_unknown_and_like_nothing_is_told_with_what_there_is() -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({"policy": "x", "filter": {"zzz": 1}})
    path, sentence = explain(caught.value, JobSpec, at="spec")
    assert path == "spec.filter.zzz"
    assert sentence.startswith("`spec.filter.zzz` is no known field: there are rule, soups, ")
    assert explain(caught.value)[1] == "`filter.zzz` is no known field"


def test_our_own_words_are_left_as_they_are_and_long_values_are_cut() -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({"policy": "x", "stop_after": "pairs", "rounds": 2})
    assert explain(caught.value)[1].startswith("stop_after: pairs publishes no policies for a second round")
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({"policy": "x" * 1000})
    assert len(explain(caught.value)[1]) < 150
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate_json("{")
    assert explain(caught.value, at="spec")[1].startswith("spec: not JSON (EOF while parsing")
