"""Methods' answers and rewards as arrays, and what they are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sipo.evaluation.answers import Answer
from sipo.evaluation.bootstrap import Statistic, interval, of_means
from sipo.evaluation.indicators import Array, hypervolume, igd_plus, length_controlled, nondominated
from sipo.evaluation.methods import Method
from sipo.evaluation.report import Interval
from sipo.preferences import Weights


@dataclass(frozen=True)
class Made:
    """A method's answers at some of its points, by these and prompt: `scores` [points, prompts, objectives], as they count, and
    `raw`, in the judges' own units; `also` [points, prompts, further judges]; `tokens` [points, prompts]; `texts` and `truncated`
    likewise."""

    method: Method
    points: Sequence[Weights | None]
    scores: Array
    raw: Array
    also: Array
    tokens: Array
    texts: Sequence[Sequence[str]]
    truncated: Array

    @classmethod
    def of(cls, method: Method, answers: Sequence[Answer], scores: Array, raw: Array, also: Array) -> Made:
        points = len(method.points)
        by_point = [answers[point::points] for point in range(points)]
        return cls(
            method,
            method.points,
            scores,
            raw,
            also,
            np.array([[answer.tokens for answer in at] for at in by_point], dtype=np.float64),
            [[answer.text for answer in at] for at in by_point],
            np.array([[answer.finish_reason == "length" for answer in at] for at in by_point], dtype=np.float64),
        )

    def split(self, at: int) -> tuple[Made, Made]:
        """Its first points, and the others."""
        return self._part(slice(at)), self._part(slice(at, None))

    def _part(self, points: slice) -> Made:
        return Made(
            self.method,
            self.points[points],
            self.scores[points],
            self.raw[points],
            self.also[points],
            self.tokens[points],
            self.texts[points],
            self.truncated[points],
        )

    def weights(self, objectives: Sequence[str]) -> Array:
        """[points, objectives]; no points of a method that knows no weights."""
        rows = [[point[name] for name in objectives] for point in self.points if point is not None]
        return np.array(rows, dtype=np.float64).reshape(-1, len(objectives))


@dataclass(frozen=True)
class Measure:
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

    def means(self, values: Array, names: Sequence[str]) -> dict[str, Interval]:
        """Of [prompts, names], by name."""
        return {name: self.mean(values[:, index]) for index, name in enumerate(names)}

    def length_controlled(self, rewards: Array, tokens: Array, at: float) -> Interval:
        """The mean of `rewards` [prompts] as if all answers had `at` tokens, and not their own `tokens` [prompts]. Each draw fits
        its own line: the interval is wide where that length hardly occurs."""
        prompts = len(rewards)
        reward, length, product, square = (
            self.draws @ values / prompts for values in (rewards, tokens, rewards * tokens, tokens * tokens)
        )
        variance = square - length * length
        covariance = product - reward * length
        slope = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 1e-9 * square)
        return interval(reward - slope * (length - at), float(length_controlled(rewards, tokens, at).mean()))

    def igd_plus(self, index: int) -> Interval:
        """Of the method with this index. The common front moves with the draws, too."""
        first = sum(len(scores) for scores in self.scores[:index])
        own = slice(first, first + len(self.scores[index]))

        def statistic(points: Array) -> float:
            return igd_plus(points[own], points[nondominated(points)])

        return self.of(np.concatenate(self.scores), statistic)


def relative(differences: Array, of: Array, names: Sequence[str]) -> dict[str, float | None]:
    """RI: the differences [names] in parts of what they are differences to [names], by name; None over 0."""
    return {name: float(part / abs(whole)) if whole else None for name, part, whole in zip(names, differences, of, strict=True)}


def beat_both(scores: Array, originals: Array) -> Array:
    """1 where an answer is better than both originals on every objective, [prompts]: of `scores` [prompts, objectives] and
    `originals` [2, prompts, objectives]."""
    better: Array = np.all(scores > originals, axis=(0, 2)).astype(np.float64)
    return better
