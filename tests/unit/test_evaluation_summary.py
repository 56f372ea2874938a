"""From rewards to the report, by numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sipo.errors import InvalidRequest, SipoError
from sipo.evaluation.answers import Answer
from sipo.evaluation.judging import Rewards
from sipo.evaluation.methods import Method
from sipo.evaluation.plan import Plan
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.summary import comparisons, summarise
from tests.evaluation import JUDGES, method_of, plan_of

Rows = list[list[float]]


def summary(
    plan: Plan, rewards: dict[str, Rewards], texts: Sequence[str] = ("a", "b"), against: Sequence[str] = ()
) -> EvaluationReport:
    """`texts`: what every method says to each prompt, at all weights; the first is cut off."""
    answers = {
        method.name: [
            Answer(prompt=index, weights=point, text=text, tokens=10 * (index + 1), finish_reason="stop" if index else "length")
            for index, text in enumerate(texts)
            for point in method.points
        ]
        for method in plan.methods
    }
    return summarise(plan, answers, rewards, against=against, seconds={"answers of mod": 2.5})


@pytest.fixture
def methods(tmp_path: Path) -> list[Method]:
    return [method_of(tmp_path, "base"), method_of(tmp_path, "mod")]


# By objective, method and prompt, at the weights concise = 0, 1/2 and 1. mod's means are (0, 4), (1, 2), (2, 2); the base's (1, 1).
REWARDS: dict[str, Rewards] = {
    "concise": {"base": [[1], [1]], "mod": [[0, 1, 1], [0, 1, 3]], None: [[0, 0.5], [0, 0]]},
    "warm": {"base": [[0], [2]], "mod": [[4, 1, 3], [4, 3, 1]], None: [[0, 0.5], [0, 3]]},
}


def test_means_fronts_and_indicators_are_those_of_the_rewards(methods: list[Method]) -> None:
    report = summary(plan_of(methods, prompts=2, originals=True), REWARDS)
    base, mod = report.methods
    assert [{name: one.value for name, one in point.rewards.items()} for point in mod.points] == [
        {"concise": 0.0, "warm": 4.0},
        {"concise": 1.0, "warm": 2.0},
        {"concise": 2.0, "warm": 2.0},
    ]
    assert [point.weights for point in mod.points] == [{"concise": c, "warm": 1 - c} for c in (0.0, 0.5, 1.0)]
    assert (mod.front, base.front) == ([0, 2], [0])
    assert (mod.hypervolume.value, base.hypervolume.value) == (4.0, 1.0)
    assert report.reference_point == {"concise": 0.0, "warm": 0.0}
    # The common front is mod's own: (0, 4), to which (1, 1) lacks 3 of warm, and (2, 2), to which it lacks 1 of both.
    assert (mod.igd_plus.value, base.igd_plus.value) == (0.0, pytest.approx((3 + 2**0.5) / 2))
    assert mod.inner_product is not None
    assert mod.inner_product.value == pytest.approx((4 + 1.5 + 2) / 3)
    assert base.inner_product is None
    assert mod.spread == {"concise": 2.0, "warm": 2.0}
    assert base.points[0].weights is None
    assert report.tokens == {"base": 30, "mod": 90}
    assert report.seconds == {"answers of mod": 2.5}
    [comparison] = report.comparisons
    assert (comparison.method, comparison.against, comparison.difference.value) == ("mod", "base", 3.0)
    assert [sample.prompt for sample in report.samples] == ["What is 0?", "What is 1?"]
    assert report.samples[1].answers[-1].rewards == {"concise": 3.0, "warm": 1.0}
    assert [len(sample.answers) for sample in report.samples] == [4, 4]


def test_answers_dominate_that_beat_both_originals_on_every_objective(methods: list[Method]) -> None:
    report = summary(plan_of(methods, prompts=2, originals=True), REWARDS)
    shares = [[point.dominating and point.dominating.value for point in method.points] for method in report.methods]
    # The base's warm 0 beats nobody's, its 2 not the 3; mod at 1/2 beats the first prompt's, and ties with the second's 3.
    assert shares == [[0.0], [0.0, 0.5, 0.5]]
    bare = summary(plan_of(methods, prompts=2), REWARDS)
    assert bare.methods[1].points[0].dominating is None


def test_what_answers_look_like_is_told(methods: list[Method]) -> None:
    same = {"base": [[1.0]] * 4, "mod": [[1.0, 2.0, 3.0]] * 4}
    report = summary(plan_of(methods), {"concise": same, "warm": same}, ["Hello.", " Hello.\n", "…", "Bye"])
    point = report.methods[1].points[0]
    assert (point.truncated, point.empty, point.distinct, point.tokens.value) == (0.25, 0.25, 0.5, 25.0)


def test_a_judge_without_a_zero_counts_from_the_bases_mean(methods: list[Method]) -> None:
    plan = plan_of(methods, prompts=2, judges={**JUDGES, "warm": "http://key@host/score"})
    report = summary(plan, REWARDS)
    assert report.standardised == {"warm": (1.0, 1.0)}
    assert report.judges == {"concise": "python:concise", "warm": "http://host/score"}
    assert [point.rewards["warm"].value for point in report.methods[1].points] == [3.0, 1.0, 1.0]
    assert [point.rewards["concise"].value for point in report.methods[1].points] == [0.0, 1.0, 2.0]
    alike = REWARDS | {"warm": REWARDS["warm"] | {"base": [[2], [2]]}}
    with pytest.raises(
        SipoError, match=r"the judge of warm \(http://host/score\) gives the same reward, 2, to all answers of base"
    ):
        summary(plan, alike)


def test_methods_are_compared_each_with_all_before_it_or_with_those_named(tmp_path: Path) -> None:
    methods = [method_of(tmp_path, "mod", name) for name in ("a", "b", "c")]
    assert comparisons(methods, []) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert comparisons(methods, ["b"]) == [("a", "b"), ("c", "b")]
    assert comparisons(methods, ["b", "c", "b"]) == [("a", "b"), ("c", "b"), ("a", "c")]
    with pytest.raises(InvalidRequest, match="no method 'd' to compare with: there are a, b, c"):
        comparisons(methods, ["d"])
