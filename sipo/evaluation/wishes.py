"""The weight that fits a wish, among those that an evaluation measured; and what it costs of each objective.

Nothing is guessed between two measured weights: a front bends as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.report import AtWeight, EvaluationReport, MethodResult
from sipo.preferences import Weights


@dataclass(frozen=True)
class Proposal:
    """A measured weight: the mean rewards at it, and how much lower each is than the method's best."""

    weights: Weights
    rewards: dict[str, float]
    costs: dict[str, float]


def at_least(report: EvaluationReport, method: str, least: Mapping[str, float], most: str) -> Proposal:
    """As much of the objective `most` as there is where the mean rewards of others are `least` or more.

    Raises InvalidRequest if no measured weight reaches them, with the best that does.
    """
    for name in (*least, most):
        if name not in report.objectives:
            raise InvalidRequest(f"unknown objective {name!r}: the report has {', '.join(report.objectives)}", param="objective")
    chosen = _method(report, method)
    enough = [point for point in _weighted(chosen) if all(_mean(point, name) >= value for name, value in least.items())]
    if not enough:
        reached = ", ".join(f"{name} {max(_mean(point, name) for point in _weighted(chosen)):.3f}" for name in least)
        wanted = " and ".join(f"{name} {value:g}" for name, value in least.items())
        raise InvalidRequest(f"no measured weight of {method} has {wanted} or more: its best are {reached}", param="at_least")
    return _proposal(chosen, max(enough, key=lambda point: _mean(point, most)))


def most_even(report: EvaluationReport, method: str) -> Proposal:
    """Where the least gain over the base is greatest; gains count in parts of the method's greatest for the objective.

    Raises InvalidRequest if the report has no base to gain over.
    """
    chosen = _method(report, method)
    base = next((one.points[0] for one in report.methods if one.kind == "base"), None)
    if base is None:
        raise InvalidRequest("the report has no base, over which gains could be told: evaluate a base, too", param="method")

    def gain(point: AtWeight, name: str) -> float:
        best = max(_mean(other, name) for other in _weighted(chosen)) - _mean(base, name)
        return (_mean(point, name) - _mean(base, name)) / best if best > 0 else 0.0

    return _best(chosen, lambda point: min(gain(point, name) for name in report.objectives))


def best_worst_case(report: EvaluationReport, method: str) -> Proposal:
    """Where the least of the mean rewards is greatest: sensible where all of them have the same scale."""
    return _best(_method(report, method), lambda point: min(_mean(point, name) for name in report.objectives))


def _best(method: MethodResult, score: Callable[[AtWeight], float]) -> Proposal:
    return _proposal(method, max(_weighted(method), key=score))


def _proposal(method: MethodResult, point: AtWeight) -> Proposal:
    rewards = {name: _mean(point, name) for name in point.rewards}
    best = {name: max(_mean(other, name) for other in _weighted(method)) for name in rewards}
    assert point.weights is not None
    return Proposal(point.weights, rewards, {name: best[name] - reward for name, reward in rewards.items()})


def _weighted(method: MethodResult) -> list[AtWeight]:
    return [point for point in method.points if point.weights is not None]


def _mean(point: AtWeight, objective: str) -> float:
    return point.rewards[objective].value


def _method(report: EvaluationReport, name: str) -> MethodResult:
    with_weights = {method.name: method for method in report.methods if _weighted(method)}
    if name not in with_weights:
        known = ", ".join(with_weights) or "none"
        raise NotFound(f"the report has no method {name!r} that takes weights: it has {known}", param="method")
    return with_weights[name]
