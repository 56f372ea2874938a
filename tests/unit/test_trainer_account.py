"""The candidates' account of a round, with ground-truth functions that read their values from the text: "0.3 0.7" is a 0.3 and
b 0.7."""

from __future__ import annotations

from typing import Any

import pytest

from services.common.contract.messages import Candidate, PromptDecided, ScoredCandidate
from services.common.contract.reports import ImplicitOrder, RoundReport, StageAccount
from services.trainer.account import candidates_account
from sipo.evaluation.ground_truth import REWARDS
from sipo.preferences import Example
from sipo.selection import Chosen

EXAMPLE = Example(prompt="x", response_0="0.5 0.25", response_1="0.25 0.5", labels={"a": 0, "b": 1})


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "a", lambda _, text: float(text.split()[0]))
    monkeypatch.setitem(REWARDS, "b", lambda _, text: float(text.split()[1]))


def made(text: str, stage: str = "sample", rewards: dict[str, float] | None = None, *, whole: bool = True) -> ScoredCandidate:
    candidate = {"text": text, "token_ids": [1], "finish_reason": "stop" if whole else "length", "weights": None, "stage": stage}
    return ScoredCandidate(candidate=Candidate.model_validate(candidate), rewards=rewards, rejected=None)


def decided(*candidates: ScoredCandidate, chosen: tuple[Chosen, ...] = (), **fields: Any) -> PromptDecided:
    outcome = "accepted" if chosen else "none"
    return PromptDecided.model_validate(
        {"job": "j", "round": 1, "prompt": "0", "outcome": outcome, "example": EXAMPLE, "chosen": chosen, "candidates": candidates}
        | fields
    )


def test_stages_are_told_apart_and_the_truly_better_counted_truncated_or_not() -> None:
    first = decided(made("1 1", whole=False), made("0.5 1", "rewrite"), made("0.25 0.25"), made("0.75 0.75", "rewrite"))
    account = candidates_account(["a", "b"], [first, decided(made("0.25 0.25")), decided(outcome="failed", error="no room")])
    assert list(account.stages) == ["sample", "rewrite"]
    assert account.stages["sample"] == StageAccount(candidates=3, truncated=1, truly_better=1, ground_truth={"a": 0.5, "b": 0.5})
    rewritten = StageAccount(candidates=2, truncated=0, truly_better=1, ground_truth={"a": 0.625, "b": 0.875})
    assert account.stages["rewrite"] == rewritten, "equal to an original is not better"


def test_accepted_responses_are_set_against_the_best_that_was_there() -> None:
    mistaken = decided(made("0.25 0.75"), made("0.75 0.75"), made("1 1"), made("2 2", whole=False), chosen=(Chosen(candidate=0),))
    right = decided(made("0.75 1"), chosen=(Chosen(candidate=0),))
    account = candidates_account(["a", "b"], [mistaken, right, decided(made("0.75 0"))])
    assert (account.accepted.responses, account.accepted.truly_better) == (2, 1)
    assert account.accepted.gain == {"a": 0.0, "b": 0.375}
    assert account.best_available is not None
    assert account.best_available.prompts == 2
    assert account.best_available.gain == {"a": 0.375, "b": 0.5}


def test_a_response_that_was_chosen_for_one_objective_is_judged_by_it_alone() -> None:
    separate = (Chosen(candidate=0, objective="a"), Chosen(candidate=1, objective="b"))
    account = candidates_account(["a", "b"], [decided(made("0.75 0"), made("0 0.25"), chosen=separate)])
    assert (account.accepted.responses, account.accepted.truly_better) == (2, 1)
    assert account.accepted.gain == {"a": 0.25, "b": -0.25}
    assert account.best_available is not None
    assert (account.best_available.prompts, account.best_available.gain) == (0, {})


def test_implicit_rewards_are_right_where_they_order_a_candidate_against_an_original_as_the_truth_does() -> None:
    originals: dict[str, Any] = {"rewards_0": {"a": 0.0, "b": 0.0, "a=0.5": 9.0}, "rewards_1": {"a": -2.0, "b": 1.0, "a=0.5": 9.0}}
    account = candidates_account(
        ["a", "b"],
        [
            # a is above both originals, and only -1 > -2 says so; b ties with response_0 and is below response_1, as 0.5 < 1 says.
            decided(made("0.75 0.25", rewards={"a": -1.0, "b": 0.5, "a=0.5": 0.0}), **originals),
            # a is below both: equal implicit rewards do not say so, 0 > -2 says the contrary. Infinite rewards of b are none.
            decided(made("0 0", rewards={"a": 0.0, "b": float("inf"), "a=0.5": 0.0}), made("1 1"), **originals),
            # Only an external model has judged here.
            decided(made("1 1", rewards={"judge": 1.0}), rewards_0={"judge": 0.0}, rewards_1={"judge": 0.0}),
        ],
    )
    assert account.implicit_order == {"a": ImplicitOrder(comparisons=4, right=1), "b": ImplicitOrder(comparisons=1, right=1)}


def test_without_a_function_for_each_objective_nothing_is_said_to_be_truly_better() -> None:
    rewards: dict[str, Any] = {"rewards_0": {"a": 0.0, "c": 0.0}, "rewards_1": {"a": 0.0, "c": 0.0}}
    only = decided(made("1 1", rewards={"a": 1.0, "c": 1.0}), made("1 1", whole=False), chosen=(Chosen(candidate=0),), **rewards)
    half = candidates_account(["a", "c"], [only])
    assert half.stages["sample"] == StageAccount(candidates=2, truncated=1, truly_better=None, ground_truth={"a": 1.0})
    assert (half.accepted.truly_better, half.accepted.gain, half.best_available) == (None, {"a": 0.5}, None)
    assert half.implicit_order == {"a": ImplicitOrder(comparisons=2, right=2)}
    none = candidates_account(["c"], [only])
    assert none.stages["sample"] == StageAccount(candidates=2, truncated=1, truly_better=None, ground_truth={})
    assert (none.accepted.gain, none.best_available, none.implicit_order) == ({}, None, {})


def test_a_report_of_before_there_were_accounts_is_read() -> None:
    before = {"round": 1, "sampling_set": "demo:1", "reward_set": "demo:1", "ground_truth": {}, "training": {}, "policy_set": None}
    funnel = {"prompts": 1, "failed": 0, "candidates": 1, "rejected": {}, "accepted": 0, "pairs": 0}
    assert RoundReport.model_validate(before | {"funnel": funnel}).candidates is None
