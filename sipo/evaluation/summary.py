"""From answers and rewards to the report: means, fronts, indicators and comparisons, with their uncertainty."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations

import numpy as np

from sipo.errors import InvalidRequest, SipoError
from sipo.evaluation.answers import Answer
from sipo.evaluation.bootstrap import Statistic, draws, holm, interval, of_means, paired
from sipo.evaluation.indicators import Array, hypervolume, igd_plus, inner_product, nondominated, spread, standardise
from sipo.evaluation.judging import Rewards
from sipo.evaluation.methods import Method
from sipo.evaluation.plan import EXACT, Plan, shown
from sipo.evaluation.report import AtWeight, Comparison, EvaluationReport, Interval, MethodResult, Sample, SampleAnswer
from sipo.preferences import Weights

SAMPLES = 4
"""Prompts whose answers are shown side by side, evenly spread over all."""
_WORD = re.compile(r"\w")


def summarise(
    plan: Plan,
    answers: Mapping[str, Sequence[Answer]],
    rewards: Mapping[str, Rewards],
    *,
    against: Sequence[str] = (),
    seed: int = 0,
    seconds: Mapping[str, float],
) -> EvaluationReport:
    """`rewards` by objective, `against` as for `comparisons`, `seed` of the bootstrap's draws."""
    standards = _standards(plan, rewards)
    made = [_Made.of(plan, method, answers[method.name], rewards, standards) for method in plan.methods]
    measure = _Measure(np.zeros(len(plan.objectives)), draws(len(plan.prompts), seed=seed), [one.scores for one in made])
    originals = _scores(plan, None, rewards, standards) if plan.has_originals else None
    first = plan.base_method or plan.methods[0]
    return EvaluationReport(
        name=plan.name,
        made=datetime.now(UTC),
        base=first.base.ref.name,
        prompts=len(plan.prompts),
        prompts_sha256=plan.prompts_sha256,
        objectives=plan.objectives,
        judges={objective: shown(address) for objective, address in plan.judges.items()},
        reference_point=dict.fromkeys(plan.objectives, 0.0),
        standardised=standards,
        max_tokens=plan.max_tokens,
        methods=[_result(plan, one, index, measure, originals) for index, one in enumerate(made)],
        comparisons=_comparisons(made, comparisons(plan.methods, against), measure),
        samples=[_sample(plan, made, index) for index in _shown_prompts(len(plan.prompts))],
        seconds=dict(seconds),
        tokens={one.method.name: int(one.tokens.sum()) for one in made},
    )


def comparisons(methods: Sequence[Method], against: Sequence[str]) -> list[tuple[str, str]]:
    """Which methods are compared with which: all with those of `against`, or, where that names none, each with all before it.

    Raises InvalidRequest for a name that no method has.
    """
    names = [method.name for method in methods]
    if unknown := next((name for name in against if name not in names), None):
        raise InvalidRequest(f"there is no method {unknown!r} to compare with: there are {', '.join(names)}", param="against")
    if not against:
        return [(later, earlier) for earlier, later in combinations(names, 2)]
    pairs = [(name, other) for other in against for name in names if name != other]
    return [pair for index, pair in enumerate(pairs) if pair[::-1] not in pairs[:index] and pair not in pairs[:index]]


@dataclass(frozen=True)
class _Made:
    """A method's answers by weight and prompt: `scores` [weights, prompts, objectives], `tokens` [weights, prompts], `texts` and
    `truncated` likewise."""

    method: Method
    scores: Array
    tokens: Array
    texts: Sequence[Sequence[str]]
    truncated: Array

    @classmethod
    def of(
        cls,
        plan: Plan,
        method: Method,
        answers: Sequence[Answer],
        rewards: Mapping[str, Rewards],
        standards: Mapping[str, tuple[float, float]],
    ) -> _Made:
        points = len(method.points)
        by_point = [answers[point::points] for point in range(points)]
        return cls(
            method,
            _scores(plan, method.name, rewards, standards),
            np.array([[answer.tokens for answer in at] for at in by_point], dtype=np.float64),
            [[answer.text for answer in at] for at in by_point],
            np.array([[answer.finish_reason == "length" for answer in at] for at in by_point], dtype=np.float64),
        )


@dataclass(frozen=True)
class _Measure:
    """What methods are measured by: the same draws of prompts, and the common front of all of them."""

    reference: Array
    draws: Array
    scores: Sequence[Array]

    def hypervolume(self, points: Array) -> float:
        return hypervolume(points, self.reference)

    def of(self, scores: Array, statistic: Statistic) -> Interval:
        return interval(of_means(scores, self.draws, statistic), statistic(scores.mean(axis=1)))

    def mean(self, values: Array) -> Interval:
        """Of one value to each prompt."""
        return interval(self.draws @ values / len(values), float(values.mean()))

    def igd_plus(self, index: int) -> Interval:
        """Of the method with this index. The common front moves with the draws, too."""
        first = sum(len(scores) for scores in self.scores[:index])
        own = slice(first, first + len(self.scores[index]))

        def statistic(points: Array) -> float:
            return igd_plus(points[own], points[nondominated(points)])

        return self.of(np.concatenate(self.scores), statistic)


def _standards(plan: Plan, rewards: Mapping[str, Rewards]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the base's rewards, for objectives whose judges' own zero means nothing."""
    standards = {}
    for objective, address in plan.judges.items():
        if address.startswith(EXACT):
            continue
        assert plan.base_method is not None, "the plan has checked it"
        of_base = np.array(rewards[objective][plan.base_method.name], dtype=np.float64)
        if of_base.std() == 0:
            raise SipoError(
                f"the judge of {objective} ({shown(address)}) gives the same reward, {of_base.flat[0]:g}, to all answers of "
                f"{plan.base_method.name}: there is nothing to count others by"
            )
        standards[objective] = (float(of_base.mean()), float(of_base.std()))
    return standards


def _scores(plan: Plan, method: str | None, rewards: Mapping[str, Rewards], standards: Mapping[str, tuple[float, float]]) -> Array:
    """[weights, prompts, objectives]; of the originals, the two responses are in place of the weights."""
    raw = np.array([rewards[objective][method] for objective in plan.objectives], dtype=np.float64)
    mean, std = zip(*(standards.get(objective, (0.0, 1.0)) for objective in plan.objectives), strict=True)
    return standardise(raw.transpose(2, 1, 0), mean, std)


def _result(plan: Plan, made: _Made, index: int, measure: _Measure, originals: Array | None) -> MethodResult:
    means = made.scores.mean(axis=1)
    weights = [list(point.values()) for point in _weights(plan, made.method)]
    return MethodResult(
        name=made.method.name,
        kind=made.method.kind,
        source=made.method.source,
        points=[_at_weight(plan, made, point, measure, originals) for point in range(len(made.method.points))],
        front=nondominated(means),
        hypervolume=measure.of(made.scores, measure.hypervolume),
        igd_plus=measure.igd_plus(index),
        inner_product=measure.of(made.scores, lambda points: inner_product(points, weights)) if weights else None,
        spread=dict(zip(plan.objectives, map(float, spread(means)), strict=True)),
    )


def _weights(plan: Plan, method: Method) -> list[Weights]:
    """In the objectives' order; none of a method that knows no weights."""
    return [{name: point[name] for name in plan.objectives} for point in method.points if point is not None]


def _at_weight(plan: Plan, made: _Made, point: int, measure: _Measure, originals: Array | None) -> AtWeight:
    texts = [text.strip() for text in made.texts[point]]
    times = Counter(texts)
    scores = made.scores[point]
    dominating = None
    if originals is not None:
        beaten = (scores > originals).all(axis=(0, 2))  # both responses, on every objective
        dominating = measure.mean(beaten.astype(np.float64))
    return AtWeight(
        weights=made.method.points[point],
        rewards={name: measure.mean(scores[:, index]) for index, name in enumerate(plan.objectives)},
        tokens=measure.mean(made.tokens[point]),
        truncated=float(made.truncated[point].mean()),
        empty=sum(not _WORD.search(text) for text in texts) / len(texts),
        distinct=sum(times[text] == 1 for text in texts) / len(texts),
        dominating=dominating,
    )


def _comparisons(made: Sequence[_Made], pairs: Sequence[tuple[str, str]], measure: _Measure) -> list[Comparison]:
    scores = {one.method.name: one.scores for one in made}
    found = [paired(scores[name], scores[other], measure.draws, measure.hypervolume) for name, other in pairs]
    corrected = holm([p_value for _, p_value in found])
    return [
        Comparison(method=name, against=other, difference=difference, p_value=p_value)
        for (name, other), (difference, _), p_value in zip(pairs, found, corrected, strict=True)
    ]


def _shown_prompts(prompts: int) -> list[int]:
    return sorted({round(step * (prompts - 1) / (SAMPLES - 1)) for step in range(SAMPLES)})


def _sample(plan: Plan, made: Sequence[_Made], index: int) -> Sample:
    answers = [
        SampleAnswer(
            method=one.method.name,
            weights=weights,
            text=one.texts[point][index],
            rewards=dict(zip(plan.objectives, map(float, one.scores[point, index]), strict=True)),
        )
        for one in made
        for point, weights in enumerate(one.method.points)
    ]
    return Sample(prompt=plan.prompts[index].prompt, answers=answers)
