"""From rewards to the report, by numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sipo.errors import SipoError
from sipo.evaluation.answers import Answer
from sipo.evaluation.job_account import JobAccount
from sipo.evaluation.judging import Rewards
from sipo.evaluation.methods import Method
from sipo.evaluation.plan import Plan
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.summary import BINS, Context, summarise
from tests.evaluation import JUDGES, method_of, plan_of

Rows = list[list[float]]


def summary(plan: Plan, rewards: dict[str, Rewards], texts: Sequence[str] = ("a", "b"), **others: Any) -> EvaluationReport:
    """`texts`: what every method says to each prompt, at all weights; the first is cut off."""
    answers = {
        method.name: [
            Answer(prompt=index, weights=point, text=text, tokens=10 * (index + 1), finish_reason="stop" if index else "length")
            for index, text in enumerate(texts)
            for point in method.points
        ]
        for method in plan.methods
    }
    return summarise(plan, answers, rewards, seconds={"answers of mod": 2.5}, **others)


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


def test_what_a_weight_asks_for_is_set_against_what_it_gets(methods: list[Method]) -> None:
    base, mod = summary(plan_of(methods, prompts=2), REWARDS).methods
    # Of mod's means (0, 4), (1, 2), (2, 2) the middle one has half of the first objective's width and none of the second's.
    assert [point.got for point in mod.points] == [
        {"concise": 0, "warm": 1},
        {"concise": 1, "warm": 0},
        {"concise": 1, "warm": 0},
    ]
    assert mod.calibration is not None
    assert mod.calibration.difference.value == pytest.approx(1 / 6)
    assert mod.calibration.monotonicity == {"concise": pytest.approx(1), "warm": pytest.approx(3**0.5 / 2)}
    assert (base.calibration, base.points[0].got) == (None, None)


def test_originals_are_set_against_answers_as_in_table_2(methods: list[Method]) -> None:
    report = summary(plan_of(methods, prompts=2, originals=True), REWARDS)
    # Of the originals' (0, 0) and (0.5, 0.5), concise prefers the second; of (0, 0) and (0, 3) it knows no better than the first.
    assert report.originals == {"concise": {"concise": 0.25, "warm": 0.25}, "warm": {"concise": 0.25, "warm": 1.75}}
    assert report.methods[1].points[1].over_originals == {"concise": pytest.approx(3), "warm": pytest.approx(0.25 / 1.75)}
    assert summary(plan_of(methods, prompts=2), REWARDS).originals == {}


def test_unseen_weights_count_for_no_front_and_are_set_against_their_neighbours(methods: list[Method]) -> None:
    base, mod = methods
    unseen = [{"concise": 0.25, "warm": 0.75}]
    rewards: dict[str, Rewards] = {
        name: {"base": of["base"], "mod": [[*row, further] for row, further in zip(of["mod"], (3, 5), strict=True)]}
        for name, of in REWARDS.items()
    }
    plan = replace(plan_of([base, replace(mod, points=[*mod.points, *unseen])], prompts=2), unseen=unseen)
    report = summary(plan, rewards)
    known = summary(plan_of(methods, prompts=2), REWARDS)
    assert [one.points for one in report.methods] == [one.points for one in known.methods]
    assert report.comparisons == known.comparisons
    [found] = report.methods[1].unseen
    assert {name: one.value for name, one in found.rewards.items()} == {"concise": 4, "warm": 4}
    assert found.inner_product.value == 4
    # Half-way between (0, 4) and (1, 2): 1/4 of 1/2, and 3/4 of 3.
    assert found.gap is not None
    assert found.gap.value == pytest.approx(4 - (0.125 + 2.25))
    assert report.tokens == {"base": 30, "mod": 120}
    assert report.methods[0].unseen == []


def test_side_effects_are_told_and_their_difference_to_the_base(methods: list[Method]) -> None:
    plan = replace(plan_of(methods, prompts=2), also={"loud": "http://key@host/score"})
    loud: Rewards = {"base": [[5], [7]], "mod": [[5, 6, 9], [8, 8, 9]]}
    base, mod = summary(plan, REWARDS | {"loud": loud}).methods
    assert [point.also["loud"].value for point in mod.points] == [6.5, 7, 9]
    assert [point.also_difference["loud"].value for point in mod.points] == [0.5, 1, 3]
    assert base.points[0].also_difference["loud"].value == 0
    assert "loud" not in mod.points[0].rewards
    alone = summary(replace(plan, methods=methods[1:]), REWARDS | {"loud": loud})
    assert alone.methods[0].points[0].also_difference == {}
    assert alone.also == {"loud": "http://host/score"}


def test_rewards_are_standardised_by_the_answers_to_validation_prompts(methods: list[Method]) -> None:
    plan = plan_of(methods, prompts=2, judges={**JUDGES, "warm": "http://host/score"})
    validation = [prompt.model_copy(update={"prompt": f"Else {index}"}) for index, prompt in enumerate(plan.prompts)]
    plan = replace(plan, validation=validation)
    assert plan.validated is not None
    assert (list(plan.validated.judges), [one.name for one in plan.validated.methods]) == (["warm"], ["base"])
    report = summary(plan, REWARDS, validation={"warm": {"base": [[-2.0], [6.0]]}})
    assert (report.standardised, report.standardised_on) == ({"warm": (2.0, 4.0)}, 2)
    assert [point.rewards["warm"].value for point in report.methods[1].points] == [0.5, 0, 0]


def test_a_judge_is_set_against_the_exact_function_of_its_objective(methods: list[Method]) -> None:
    texts = ["You are kind, and we thank you for it.", "This is about a stone in the road."]
    answers = {
        "base": [Answer(prompt=index, weights=None, text=texts[0], tokens=9, finish_reason="stop") for index in range(3)],
        "mod": [
            Answer(prompt=index, weights=point, text=texts[place % 2] if index else texts[0], tokens=9, finish_reason="stop")
            for index in range(3)
            for place, point in enumerate(methods[1].points)
        ],
    }

    def agreed(kind: float, stone: float) -> float:
        row = [kind, stone, kind]
        warm: Rewards = {"base": [[kind], [kind], [kind + 1]], "mod": [[kind] * 3, row, [one + 1 for one in row]]}
        rewards = {"concise": warm, "warm": warm}
        plan = plan_of(methods, prompts=3, judges={**JUDGES, "warm": "http://host/score"})
        return summarise(plan, answers, rewards, seconds={}).agreement["warm"].value

    assert (agreed(2, 1), agreed(1, 2), agreed(1, 1)) == (1, 0, 0.5)
    exact = summarise(
        plan_of(methods, prompts=3), answers, {name: {"base": [[1]] * 3, "mod": [[1] * 3] * 3} for name in JUDGES}, seconds={}
    )
    assert exact.agreement == {}


def test_rewards_are_told_as_if_all_answers_were_as_long_as_the_bases(methods: list[Method]) -> None:
    plan = plan_of(methods, prompts=2)
    answers = {
        method.name: [
            Answer(prompt=index, weights=point, text="a", tokens=tokens[index], finish_reason="stop")
            for index in range(2)
            for point in method.points
        ]
        for method, tokens in zip(methods, ([10, 20], [20, 40]), strict=True)
    }
    report = summarise(plan, answers, REWARDS, seconds={})
    # mod at the last weight: concise 1 and 3 with 20 and 40 tokens, 0.1 a token; with the base's 15 it would be 0.5.
    assert report.methods[1].points[2].length_controlled["concise"].value == pytest.approx(0.5)
    assert report.methods[0].points[0].length_controlled["warm"].value == pytest.approx(1)


def test_the_spread_of_rewards_is_counted_in_the_same_bins_for_all(methods: list[Method]) -> None:
    report = summary(plan_of(methods, prompts=2), REWARDS)
    assert (report.bins["concise"][0], report.bins["concise"][-1], len(report.bins["concise"])) == (0, 3, BINS + 1)
    counts = report.methods[1].points[2].histograms["concise"]  # 1 and 3
    assert (sum(counts), counts[BINS // 3], counts[-1]) == (2, 1, 1)


def test_a_judge_that_filtered_the_training_pairs_is_told(methods: list[Method]) -> None:
    job = JobAccount(job="job-1", policy="demo", rounds=[], trainings=[], reward_models={"kind": "python:warm", "lost": ""})
    report = summary(plan_of(methods, prompts=2), REWARDS, context=Context(jobs=[job]))
    assert (report.filtered, report.jobs) == ({"warm": "kind"}, [job])


def test_divergences_are_means_over_the_prompts_that_were_looked_at(methods: list[Method]) -> None:
    report = summary(plan_of(methods, prompts=2), REWARDS, divergences={"mod": [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]})
    assert [point.divergence and point.divergence.value for point in report.methods[1].points] == pytest.approx([0.2, 0.2, 0.2])
    assert report.methods[0].points[0].divergence is None


def test_a_report_of_before_there_were_such_figures_is_still_read(methods: list[Method]) -> None:
    report = summary(plan_of(methods, prompts=2), REWARDS).model_dump(mode="json")
    for name in ("also", "filtered", "standardised_on", "verdicts", "originals", "agreement", "bins", "data", "jobs"):
        del report[name]
    for method in report["methods"]:
        del method["calibration"], method["unseen"]
        for point in method["points"]:
            for name in ("over_originals", "length_controlled", "got", "also", "also_difference", "histograms", "divergence"):
                del point[name]
    for comparison in report["comparisons"]:
        del comparison["improvements"]
    assert EvaluationReport.model_validate(report).methods[1].points[0].got is None
