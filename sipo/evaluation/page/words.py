"""What an evaluation found, in words: its answer, what is wrong with its answers, and what its pictures show.

A no-break space (\\xa0) keeps a figure and its sign on one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10

from sipo.evaluation.comparing import certain
from sipo.evaluation.job_account import JobAccount, RoundShown
from sipo.evaluation.report import (
    AtWeight,
    Comparison,
    EvaluationReport,
    Interval,
    Kind,
    MethodResult,
    SampleAnswer,
    Verdict,
    family,
    seed_of,
)
from sipo.preferences import Weights
from sipo.words import counted

_KINDS: Mapping[Kind, str] = {
    "base": "alone",
    "reference": "what its policies were aligned from, alone",
    "mod": "its policies mixed in logit space",
    "soup": "its policies merged",
    "models": "a model of its own for each weight",
}

MOST_EMPTY, MOST_TRUNCATED, FEWEST_DISTINCT = 0.05, 0.3, 0.5
"""Shares of a weight's answers beyond which the page warns."""


def places(intervals: Iterable[Interval]) -> int:
    """Decimal places that show the widest of the intervals with two digits: more would be noise, and a column has as many."""
    width = max((interval.high - interval.low for interval in intervals), default=0.0)
    return 3 if width <= 0 else min(max(1 - floor(log10(width)), 0), 6)


def number(value: float, decimals: int) -> str:
    """With a true minus sign, and none before a zero."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def percent(share: float) -> str:
    """Whole percents, but never 0 % of something or 100 % of not quite all."""
    if 0 < share < 0.01:
        return "<\xa01\xa0%"
    return ">\xa099\xa0%" if 0.99 < share < 1 else f"{100 * share:.0f}\xa0%"


def signed_percent(share: float) -> str:
    """Of a difference, in whole percents."""
    text = f"{100 * share:+.0f}"
    return f"{'0' if float(text) == 0 else text.replace('-', '−')}\xa0%"


def between(interval: Interval, decimals: int) -> str:
    return f"{number(interval.low, decimals)} to {number(interval.high, decimals)}"


def with_interval(interval: Interval, decimals: int) -> str:
    return f"{number(interval.value, decimals)} ({between(interval, decimals)})"


def by_name(values: Mapping[str, float], digits: int) -> str:
    """`concise 0.2, warm 0.8`, with so many significant digits."""
    return ", ".join(name + " " + f"{value:.{digits}g}".replace("-", "−") for name, value in values.items())


def weight(weights: Weights | None) -> str:
    return "no weights" if weights is None else by_name(weights, 3)


def weight_names(report: EvaluationReport) -> dict[str, str]:
    """What pictures call each weight, by the weight in words: the first one's figure if there are two, else a number in order."""
    distinct = {weight(point.weights): point.weights for method in report.methods for point in method.points if point.weights}
    if len(report.objectives) == 2:
        return {key: f"{weights[report.objectives[0]]:.3g}" for key, weights in distinct.items()}
    return {key: f"w{count}" for count, key in enumerate(distinct, 1)}


def method_in_words(method: MethodResult) -> str:
    return f"{method.source}, {_KINDS[method.kind]}"


# The answer


def comparison_in_words(comparison: Comparison) -> str:
    difference, method, against = comparison.difference, comparison.method, comparison.against
    decimals = places([difference])
    direction = "higher" if difference.value >= 0 else "lower"
    size = number(abs(difference.value), decimals)
    found = (
        f"{method}{_s(method)} hypervolume is {size} {direction} than {against}{_s(against)} "
        f"(95\xa0%: {between(difference, decimals)}, {_p_value(comparison.p_value)})."
    )
    return found if certain(comparison) else f"Between {method} and {against} no difference is certain: {found}"


def findings(report: EvaluationReport) -> list[str]:
    """A sentence for every two methods that were compared; where trainings have seeds, for every two families."""
    if not seeded(report):
        return [comparison_in_words(comparison) for comparison in report.comparisons]
    return [verdict_in_words(verdict, report) for verdict in report.verdicts]


def diverged(report: EvaluationReport) -> bool:
    return any(point.divergence for method in report.methods for point in method.points)


def seeded(report: EvaluationReport) -> bool:
    return any(seed_of(method.name) for method in report.methods)


def verdict_in_words(verdict: Verdict, report: EvaluationReport) -> str:
    of_both = compared(verdict, report)
    if not verdict.seeds:
        return comparison_in_words(of_both[0])
    decimals = places(one.difference for one in of_both)
    sizes = sorted(one.difference.value for one in of_both)
    found = f"{number(sizes[0], decimals)} to {number(sizes[-1], decimals)}"
    if len(verdict.seeds) == 1:
        seeds, found = f"seed {verdict.seeds[0]}", number(sizes[0], decimals)
    else:
        seeds = f"seeds {', '.join(verdict.seeds)}"
    size = f"hypervolume differs by {found} over {seeds}; greatest {_p_value(max(one.p_value for one in of_both))}"
    match verdict.verdict:
        case "wins":
            return f"{verdict.method} wins over {verdict.against}, in every seed: {size}."
        case "loses":
            return f"{verdict.method} loses to {verdict.against}, in every seed: {size}."
        case "not decided":
            return f"Between {verdict.method} and {verdict.against} it is not decided: {size}."


def compared(verdict: Verdict, report: EvaluationReport) -> list[Comparison]:
    """The comparisons that the verdict is made of."""
    return [one for one in report.comparisons if (family(one.method), family(one.against)) == (verdict.method, verdict.against)]


def answer(report: EvaluationReport) -> str:
    """The sentence before all comparisons."""
    decimals = places(method.hypervolume for method in report.methods)
    best = max(report.methods, key=lambda method: method.hypervolume.value)
    highest = f"{number(best.hypervolume.value, decimals)} (95\xa0%: {between(best.hypervolume, decimals)})"
    if len(report.methods) == 1:
        return f"{best.name}{_s(best.name)} hypervolume is {highest}. There was no other method to compare it with."
    found = f"The highest hypervolume is {best.name}{_s(best.name)}, {highest}."
    return found if not report.comparisons or any(map(certain, report.comparisons)) else f"No difference is certain. {found}"


def _s(name: str) -> str:
    return "’" if name.endswith("s") else "’s"


def _p_value(value: float) -> str:
    return f"p\xa0{p_number(value)}" if value < 0.001 else f"p\xa0=\xa0{p_number(value)}"


def p_number(value: float) -> str:
    return "<\xa00.001" if value < 0.001 else f"{value:.2g}"


# Warnings


def warnings(report: EvaluationReport) -> list[str]:
    """What makes a method's answers, or a judge's rewards, useless though the figures may look well, a sentence each."""
    found = [
        f"The judge of {name} filtered the training pairs (the job’s reward model {model}): it judges what was chosen to please it."
        for name, model in report.filtered.items()
    ]
    for method in report.methods:
        for what, shares in (
            ("answers are empty", [(point, point.empty) for point in method.points if point.empty > MOST_EMPTY]),
            (
                "answers are cut off by the limit of tokens",
                [(point, point.truncated) for point in method.points if point.truncated > MOST_TRUNCATED],
            ),
            (
                "answers are alike, few are given to one prompt only",
                [(point, point.distinct) for point in method.points if point.distinct < FEWEST_DISTINCT],
            ),
        ):
            if shares:
                found.append(f"{method.name}: {what} ({'; '.join(_share_at(*share) for share in shares)}).")
        found += filter(None, (miscalibration(method, objective) for objective in report.objectives))
    return found


def _share_at(point: AtWeight, share: float) -> str:
    return percent(share) if point.weights is None else f"{percent(share)} at {weight(point.weights)}"


def miscalibration(method: MethodResult, objective: str) -> str | None:
    """The deepest fall of an objective's mean reward from a weight to one that asks more of it, if each of the two means lies
    outside the other's interval; None where more asked is nowhere less got."""
    asked = [(point.weights[objective], point.rewards[objective]) for point in method.points if point.weights is not None]
    falls = [
        (less.value - more.value, less_asked, less, more_asked, more)
        for less_asked, less in asked
        for more_asked, more in asked
        if less_asked < more_asked and more.high < less.value and more.value < less.low
    ]
    if not falls:
        return None
    _, less_asked, less, more_asked, more = max(falls, key=lambda fall: fall[0])
    decimals = places([less, more])
    return (
        f"{method.name} is miscalibrated in {objective}: weight {more_asked:.3g} asks more of it than {less_asked:.3g} "
        f"but gets less, {number(more.value, decimals)} instead of {number(less.value, decimals)}."
    )


# What the pictures show


def front_in_words(report: EvaluationReport) -> str:
    decimals = {
        name: places(point.rewards[name] for method in report.methods for point in method.points) for name in report.objectives
    }
    methods = [f"{method.name}: " + "; ".join(_point(point, decimals) for point in method.points) for method in report.methods]
    return f"Mean rewards of {' and '.join(report.objectives)}, with 95 % intervals. " + ". ".join(methods) + "."


def _point(point: AtWeight, decimals: Mapping[str, int]) -> str:
    rewards = ", ".join(f"{name} {with_interval(point.rewards[name], digits)}" for name, digits in decimals.items())
    return rewards if point.weights is None else f"at weights {weight(point.weights)} rewards {rewards}"


def hypervolumes_in_words(report: EvaluationReport) -> str:
    decimals = places(method.hypervolume for method in report.methods)
    volumes = (f"{method.name} {with_interval(method.hypervolume, decimals)}" for method in report.methods)
    return f"Hypervolumes, with 95 % intervals: {'; '.join(volumes)}."


def calibrations_in_words(report: EvaluationReport) -> str:
    shares = [
        f"{method.name}: "
        + "; ".join(f"asked {weight(point.weights)}, got {by_name(point.got, 2)}" for point in method.points if point.got)
        for method in report.methods
        if method.calibration
    ]
    return f"Shares of the objectives, asked and got. {'. '.join(shares)}."


def improvements_in_words(report: EvaluationReport) -> str:
    decimals = places(one.average for comparison in report.comparisons for one in comparison.improvements)
    lines = [
        f"{comparison.method} over {comparison.against}: "
        + "; ".join(f"{weight(one.weights)} {with_interval(one.average, decimals)}" for one in comparison.improvements)
        for comparison in report.comparisons
        if comparison.improvements
    ]
    return f"Mean improvement over all objectives by weight, with 95 % intervals. {'. '.join(lines)}."


# A job


def round_in_words(one: RoundShown) -> str:
    have = "has" if one.accepted == 1 else "have"
    accepted = f"of {counted(one.prompts, 'prompt')} {one.accepted} {have} a response that passed the filter"
    return f"Round {one.round}: {accepted}, which makes {counted(one.pairs, 'training pair')}."


def evaluated_in_words(found: Comparison | str) -> str:
    return f"It could not be evaluated: {found}." if isinstance(found, str) else comparison_in_words(found)


def curves_in_words(job: JobAccount) -> str:
    return f"Losses of the trainings of {job.job} over their steps."


# What the tables show


def by_weight(answers: Sequence[SampleAnswer]) -> list[tuple[Weights | None, list[SampleAnswer]]]:
    """The answers to a prompt, those at the same weight side by side."""
    groups: dict[str, tuple[Weights | None, list[SampleAnswer]]] = {}
    for given in answers:
        groups.setdefault(weight(given.weights), (given.weights, []))[1].append(given)
    return list(groups.values())


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
