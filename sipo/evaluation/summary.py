"""From answers and rewards to the report: means, fronts, indicators and comparisons, with their uncertainty."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
from pydantic import Field

from sipo.datasets import ConflictReport
from sipo.errors import SipoError
from sipo.evaluation.agreeing import agreements
from sipo.evaluation.answers import Answer
from sipo.evaluation.bootstrap import draws
from sipo.evaluation.comparing import compare, comparisons
from sipo.evaluation.indicators import (
    Array,
    got_shares,
    inner_product,
    miscalibration,
    monotonicity,
    nondominated,
    spread,
    standardise,
)
from sipo.evaluation.job_account import JobAccount
from sipo.evaluation.judging import Rewards
from sipo.evaluation.measured import Made, Measure, beat_both, relative
from sipo.evaluation.methods import Method
from sipo.evaluation.plan import Plan, shown
from sipo.evaluation.report import (
    AtWeight,
    Calibration,
    EvaluationReport,
    Interval,
    MethodResult,
    Sample,
    SampleAnswer,
    UnseenWeight,
)
from sipo.evaluation.unseen import at_unseen
from sipo.record import Record

SAMPLES = 4
"""Prompts whose answers are shown side by side, evenly spread over all."""
BINS = 16
"""Of a histogram, from the least reward of any answer to the greatest."""
_WORD = re.compile(r"\w")

Divergences = Mapping[str, Sequence[Sequence[float]]]
"""By method: of each prompt that was looked at, a mean per-token KL at each of the method's points."""


class Context(Record):
    """What a report shows beside what was measured: how much the objectives of training data disagree, and the jobs that the
    policies come from."""

    data: dict[str, ConflictReport] = Field(default={}, description="by file")
    jobs: list[JobAccount] = Field(default=[])


def summarise(
    plan: Plan,
    answers: Mapping[str, Sequence[Answer]],
    rewards: Mapping[str, Rewards],
    *,
    validation: Mapping[str, Rewards] | None = None,
    divergences: Divergences | None = None,
    context: Context | None = None,
    against: Sequence[str] = (),
    seed: int = 0,
    seconds: Mapping[str, float],
) -> EvaluationReport:
    """`rewards` by objective and further judge, `validation` likewise those of the base's answers to the validation prompts;
    `against` as for `comparisons`, `seed` of the bootstrap's draws."""
    standards = _standards(plan, rewards if validation is None else validation)
    whole = [_made(plan, method, answers[method.name], rewards, standards) for method in plan.methods]
    parts = [one.split(plan.seen(one.method)) for one in whole]
    made = [seen for seen, _ in parts]
    measure = Measure(np.zeros(len(plan.objectives)), draws(len(plan.prompts), seed=seed), [one.scores for one in made])
    summary = _Summary(plan, made, measure, _originals(plan, rewards), standards, divergences or {})
    pairs = comparisons([one.method.name for one in made], against)
    compared, verdicts = compare(made, pairs, plan.objectives, measure, originals=summary.originals, seed=seed)
    context = context or Context()
    return EvaluationReport(
        name=plan.name,
        made=datetime.now(UTC),
        base=(plan.base_method or plan.methods[0]).base.ref.name,
        prompts=len(plan.prompts),
        prompts_sha256=plan.prompts_sha256,
        objectives=plan.objectives,
        judges={objective: shown(address) for objective, address in plan.judges.items()},
        also={name: shown(address) for name, address in plan.also.items()},
        filtered=filtered(plan, context.jobs),
        reference_point=dict.fromkeys(plan.objectives, 0.0),
        standardised=standards,
        standardised_on=len(plan.validation) or None,
        max_tokens=plan.max_tokens,
        methods=[summary.result(index, at_unseen(*both, plan.objectives, measure)) for index, both in enumerate(parts)],
        comparisons=compared,
        verdicts=verdicts,
        originals=summary.preferred,
        agreement=agreements(plan, answers, rewards, seed=seed),
        bins={name: list(map(float, edges)) for name, edges in summary.bins.items()},
        data=context.data,
        jobs=context.jobs,
        samples=[_sample(plan, made, index) for index in _shown_prompts(len(plan.prompts))],
        seconds=dict(seconds),
        tokens={one.method.name: int(one.tokens.sum()) for one in whole},
    )


def _standards(plan: Plan, rewards: Mapping[str, Rewards]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the base's rewards, for objectives whose judges' own zero means nothing."""
    standards = {}
    for objective in plan.inexact:
        assert plan.base_method is not None, "the plan has checked it"
        of_base = np.array(rewards[objective][plan.base_method.name], dtype=np.float64)
        if of_base.std() == 0:
            raise SipoError(
                f"the judge of {objective} ({shown(plan.judges[objective])}) gives the same reward, {of_base.flat[0]:g}, to all "
                f"answers of {plan.base_method.name}: there is nothing to count others by"
            )
        standards[objective] = (float(of_base.mean()), float(of_base.std()))
    return standards


def _made(
    plan: Plan,
    method: Method,
    answers: Sequence[Answer],
    rewards: Mapping[str, Rewards],
    standards: Mapping[str, tuple[float, float]],
) -> Made:
    raw = _raw(plan.objectives, method.name, rewards)
    also = _raw(list(plan.also), method.name, rewards) if plan.also else np.empty((*raw.shape[:2], 0))
    return Made.of(method, answers, _standard(plan, raw, standards), raw, also)


def _raw(judges: Sequence[str], method: str | None, rewards: Mapping[str, Rewards]) -> Array:
    """[weights, prompts, judges]; of the originals, the two responses are in place of the weights."""
    return np.array([rewards[name][method] for name in judges], dtype=np.float64).transpose(2, 1, 0)


def _originals(plan: Plan, rewards: Mapping[str, Rewards]) -> Array | None:
    """[2, prompts, objectives], in the judges' own units, where there are any."""
    return _raw(plan.objectives, None, rewards) if plan.has_originals else None


def _standard(plan: Plan, raw: Array, standards: Mapping[str, tuple[float, float]]) -> Array:
    mean, std = zip(*(standards.get(objective, (0.0, 1.0)) for objective in plan.objectives), strict=True)
    return standardise(raw, mean, std)


def filtered(plan: Plan, jobs: Sequence[JobAccount]) -> dict[str, str]:
    """The judges that filtered the training pairs of any of the jobs: by name, what the job calls the reward model."""
    filters = {address: name for job in jobs for name, address in job.reward_models.items() if address}
    return {name: filters[shown(address)] for name, address in plan.all_judges.items() if shown(address) in filters}


@dataclass(frozen=True)
class _Summary:
    """What the results of all methods are made from. `raw_originals` [2, prompts, objectives]."""

    plan: Plan
    made: Sequence[Made]
    measure: Measure
    raw_originals: Array | None
    standards: Mapping[str, tuple[float, float]]
    divergences: Divergences

    @cached_property
    def originals(self) -> Array | None:
        """As they count, [2, prompts, objectives]."""
        return None if self.raw_originals is None else _standard(self.plan, self.raw_originals, self.standards)

    @cached_property
    def preferred(self) -> dict[str, dict[str, float]]:
        return {} if self.raw_originals is None else _preferred(self.raw_originals, self.plan.objectives)

    @cached_property
    def baseline(self) -> Made | None:
        return next((one for one in self.made if one.method is self.plan.baseline), None)

    @cached_property
    def bins(self) -> dict[str, Array]:
        """Edges [BINS + 1] by objective."""
        rewards = np.concatenate([one.scores.reshape(-1, len(self.plan.objectives)) for one in self.made])
        return {name: np.histogram_bin_edges(rewards[:, index], BINS) for index, name in enumerate(self.plan.objectives)}

    def result(self, index: int, unseen: list[UnseenWeight]) -> MethodResult:
        made, measure = self.made[index], self.measure
        means, weights = made.scores.mean(axis=1), made.weights(self.plan.objectives)
        got = got_shares(means) if len(weights) > 1 else None
        return MethodResult(
            name=made.method.name,
            kind=made.method.kind,
            source=made.method.source,
            points=[self._at_weight(made, point, None if got is None else got[point]) for point in range(len(made.points))],
            front=nondominated(means),
            hypervolume=measure.of(made.scores, measure.hypervolume),
            igd_plus=measure.igd_plus(index),
            inner_product=measure.of(made.scores, lambda points: inner_product(points, weights)) if len(weights) else None,
            spread=dict(zip(self.plan.objectives, map(float, spread(means)), strict=True)),
            calibration=None if got is None else self._calibration(made, weights),
            unseen=unseen,
        )

    def _calibration(self, made: Made, weights: Array) -> Calibration:
        means = made.scores.mean(axis=1)
        return Calibration(
            difference=self.measure.of(made.scores, lambda points: miscalibration(points, weights)),
            monotonicity={
                name: monotonicity(weights[:, index], means[:, index]) for index, name in enumerate(self.plan.objectives)
            },
        )

    def _at_weight(self, made: Made, point: int, got: Array | None) -> AtWeight:
        measure, objectives, also = self.measure, self.plan.objectives, list(self.plan.also)
        texts = [text.strip() for text in made.texts[point]]
        times = Counter(texts)
        scores = made.scores[point]
        return AtWeight(
            weights=made.points[point],
            rewards=measure.means(scores, objectives),
            tokens=measure.mean(made.tokens[point]),
            truncated=float(made.truncated[point].mean()),
            empty=sum(not _WORD.search(text) for text in texts) / len(texts),
            distinct=sum(times[text] == 1 for text in texts) / len(texts),
            dominating=None if self.originals is None else measure.mean(beat_both(scores, self.originals)),
            over_originals=self._over_originals(made.raw[point].mean(axis=0)),
            length_controlled=self._length_controlled(made, point),
            got=None if got is None else dict(zip(objectives, map(float, got), strict=True)),
            also=measure.means(made.also[point], also),
            also_difference={} if self.baseline is None else measure.means(made.also[point] - self.baseline.also[0], also),
            histograms={name: np.histogram(scores[:, index], self.bins[name])[0].tolist() for index, name in enumerate(objectives)},
            divergence=self._divergence(made.method, point),
        )

    def _over_originals(self, means: Array) -> dict[str, float | None] | None:
        if not self.preferred:
            return None
        objectives = self.plan.objectives
        best = np.array([max(row[name] for row in self.preferred.values()) for name in objectives])
        return relative(means - best, best, objectives)

    def _length_controlled(self, made: Made, point: int) -> dict[str, Interval]:
        tokens, at = made.tokens[point], float((self.baseline or self.made[0]).tokens.mean())
        return {
            name: self.measure.length_controlled(made.scores[point, :, index], tokens, at)
            for index, name in enumerate(self.plan.objectives)
        }

    def _divergence(self, method: Method, point: int) -> Interval | None:
        """Of the prompts that were looked at, which are the first ones: with draws of their own."""
        if method.name not in self.divergences:
            return None
        values = np.array([of_prompt[point] for of_prompt in self.divergences[method.name]], dtype=np.float64)
        return Measure(self.measure.reference, draws(len(values)), ()).mean(values)


def _preferred(originals: Array, objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """The rows of Table 2: mean rewards of the originals that each objective's judge prefers; of two equal ones the first."""
    prompts = np.arange(originals.shape[1])
    rows = {}
    for index, name in enumerate(objectives):
        means = originals[originals[..., index].argmax(axis=0), prompts].mean(axis=0)
        rows[name] = dict(zip(objectives, map(float, means), strict=True))
    return rows


def _shown_prompts(prompts: int) -> list[int]:
    return sorted({round(step * (prompts - 1) / (SAMPLES - 1)) for step in range(SAMPLES)})


def _sample(plan: Plan, made: Sequence[Made], index: int) -> Sample:
    answers = [
        SampleAnswer(
            method=one.method.name,
            weights=weights,
            text=one.texts[point][index],
            rewards=dict(zip(plan.objectives, map(float, one.scores[point, index]), strict=True)),
        )
        for one in made
        for point, weights in enumerate(one.points)
    ]
    return Sample(prompt=plan.prompts[index].prompt, answers=answers)
