"""What the fields of a completion request mean, for gateway and decoder alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sipo.errors import InvalidRequest, InvalidWeights, NotFound, SipoError
from sipo.policies import PolicyStore
from sipo.targets import check_messages, check_prompt, parse_model_name, resolve_target
from tests.fakes import write_policy_set

WEIGHTS = {"concise": 0.7, "warm": 0.3}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> PolicyStore:
    """Two versions of "demo", the first of them current."""
    root: Path = tmp_path_factory.mktemp("policies")
    write_policy_set(root, "demo:1", list(WEIGHTS), current=True)
    write_policy_set(root, "demo:2", list(WEIGHTS))
    return PolicyStore(root)


@pytest.mark.parametrize(
    ("model", "parsed"),
    [
        ("demo", ("demo", None)),
        ("demo:2", ("demo:2", None)),
        ("demo:2@concise=0.7,warm=0.3", ("demo:2", WEIGHTS)),
        ("base", ("base", None)),
        ("demo@concise=9", ("demo", {"concise": 9})),
        ("@concise=1", ("", {"concise": 1})),
        ("", ("", None)),
    ],
)
def test_a_model_name_may_have_a_version_and_weights(model: str, parsed: tuple[str, dict[str, float] | None]) -> None:
    assert parse_model_name(model) == parsed


@pytest.mark.parametrize("model", ["demo@", "demo@concise", "demo@concise=1@warm=0", "demo@concise=1,concise=0"])
def test_weights_that_cannot_be_read_are_the_model_names_fault(model: str) -> None:
    with pytest.raises(InvalidWeights) as caught:
        parse_model_name(model)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "policy_set"),
    [
        ({"model": "demo"}, "demo:1"),
        ({"model": "demo:2"}, "demo:2"),
        ({"model": "base"}, None),
        ({"model": "tiny", "base_names": ("base", "tiny")}, None),
        ({"model": "", "policy_set": "demo"}, "demo:1"),
        ({"model": "nobody@concise=1,warm=0", "policy_set": "demo:2"}, "demo:2"),
        ({"model": "demo", "policy_set": "base"}, None),
    ],
)
def test_a_request_names_a_set_or_the_base(policies: PolicyStore, fields: dict[str, Any], policy_set: str | None) -> None:
    target = resolve_target(policies, preference_weights=None, **fields)
    assert (target.policy_set and target.policy_set.id) == policy_set


def test_weights_come_normalised_from_either_place_and_not_at_all_if_none_are_given(policies: PolicyStore) -> None:
    assert resolve_target(policies, "demo", None).weights is None
    assert resolve_target(policies, "demo@warm=0.3,concise=0.7", None).weights == WEIGHTS
    weights = resolve_target(policies, "demo", {"warm": 0.3001, "concise": 0.7002}).weights
    assert weights is not None
    assert list(weights) == ["concise", "warm"]
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("fields", "kind", "param", "says"),
    [
        ({"model": ""}, InvalidRequest, "model", "name a policy"),
        ({"model": "@concise=1,warm=0"}, InvalidRequest, "model", "name a policy"),
        ({"model": "demo:9"}, NotFound, "model", "demo:1, demo:2"),
        ({"model": "tiny"}, NotFound, "model", "demo"),
        ({"model": "demo", "policy_set": "demo:9"}, NotFound, "policy_set", "demo:1, demo:2"),
        ({"model": "demo@concise=1"}, InvalidWeights, "model", "no weight for 'warm'"),
        ({"model": "demo", "preference_weights": {"concise": 1}}, InvalidWeights, "preference_weights", "no weight for 'warm'"),
        ({"model": "demo", "preference_weights": {"concise": "1", "warm": 0}}, InvalidWeights, "preference_weights", "finite"),
        ({"model": "demo", "preference_weights": {"concise": 10**400, "warm": 0}}, InvalidWeights, "preference_weights", "finite"),
        ({"model": "base@concise=1"}, InvalidWeights, "model", "no objectives"),
        ({"model": "base", "preference_weights": {}}, InvalidWeights, "preference_weights", "no objectives"),
        ({"model": "demo@concise=1,warm=0", "preference_weights": WEIGHTS}, InvalidWeights, "preference_weights", "once"),
    ],
)
def test_what_is_wrong_is_told_with_the_field_at_fault(
    policies: PolicyStore, fields: dict[str, Any], kind: type[SipoError], param: str, says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        resolve_target(policies, **{"preference_weights": None} | fields)
    assert (type(caught.value), caught.value.param) == (kind, param)


@pytest.mark.parametrize("prompt", ["", [], [""], ["x", ""], [[]], [[1], []]])
def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="empty") as caught:
        check_prompt(prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("prompt", ["x", " ", ["x"], [0], [[0], [1, 2]]])
def test_a_prompt_of_any_form_says_something(prompt: Any) -> None:
    check_prompt(prompt)


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"role": "user", "content": ""}, {"content": None}, {"content": []}]]
)
def test_messages_without_content_are_refused(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="no message has any content") as caught:
        check_messages(messages)
    assert caught.value.param == "messages"


def test_one_message_with_content_is_enough_and_other_types_are_for_others_to_refuse() -> None:
    check_messages([{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "x"}]}])
    for other in (None, 0, False, {}, 3.5, "text"):
        check_messages(other)
    for other in (None, 0, False, {}, 3.5):
        check_prompt(other)
