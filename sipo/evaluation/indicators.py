"""What a front is worth: hypervolume, IGD+ and smaller measures of mean rewards, of which more is better; and how judges compare.

Pure functions over arrays, for two to eight objectives. Each raises InvalidRequest, with `param` naming the array, for a shape that
does not fit and for a number that is not finite: moocore would say nothing of a NaN, and leave its point out. Uncertainty is the
business of sipo.evaluation.bootstrap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sipo.errors import InvalidRequest

Array = NDArray[np.float64]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume of what `points` [points, objectives] dominate, down to `reference` [objectives].

    A point that is not above the reference on every objective adds nothing. More than five objectives cost much: 36 points of eight
    take 7 ms, of up to five less than 0.1 ms.
    """
    import moocore

    points = checked("points", points, "points", "objectives")
    reference = checked("reference", reference, "objectives")
    _same_objectives("reference", reference, points)
    return float(moocore.hypervolume(points, ref=reference, maximise=True))


def nondominated(points: ArrayLike) -> list[int]:
    """Which of `points` [points, objectives] no other one dominates, by index and in their order; of equal ones the first."""
    import moocore

    points = checked("points", points, "points", "objectives")
    return [int(index) for index in np.flatnonzero(moocore.is_nondominated(points, maximise=True))]


def igd_plus(points: ArrayLike, front: ArrayLike) -> float:
    """How far `points` [points, objectives] stay behind `front` [its points, objectives]: 0 if they reach or dominate all of it.

    The mean over the front's points of the distance to the nearest of `points`, counting only objectives on which it is worse.
    """
    import moocore

    points = checked("points", points, "points", "objectives")
    front = checked("front", front, "points", "objectives")
    _same_objectives("front", front, points)
    return float(moocore.igd_plus(points, ref=front, maximise=True))


def inner_product(points: ArrayLike, weights: ArrayLike) -> float:
    """The mean of weights times mean rewards, PARM's measure: `points` and `weights` are both [weights, objectives]."""
    points = checked("points", points, "weights", "objectives")
    weights = checked("weights", weights, "weights", "objectives")
    if weights.shape != points.shape:
        raise InvalidRequest(
            f"weights must have the shape of points, {list(points.shape)}, and have {list(weights.shape)}", param="weights"
        )
    return float((points * weights).sum(axis=1).mean())


def spread(points: ArrayLike) -> Array:
    """From the least to the greatest of `points` [points, objectives], by objective."""
    widths: Array = np.ptp(checked("points", points, "points", "objectives"), axis=0)
    return widths


def got_shares(points: ArrayLike) -> Array:
    """What each of `points` [weights, objectives] got of each objective, as parts of 1: [weights, objectives].

    That is the place of its mean reward between the least and the greatest of the points, normalised over the objectives. Where all
    points are alike in an objective, or a point is the least in all, nothing was got of it; the latter has equal parts.
    """
    points = checked("points", points, "weights", "objectives")
    widths = np.ptp(points, axis=0)
    places = np.divide(points - points.min(axis=0), widths, out=np.zeros_like(points), where=widths > 0)
    totals = places.sum(axis=1, keepdims=True)
    shares: Array = np.divide(places, totals, out=np.full_like(places, 1 / points.shape[1]), where=totals > 0)
    return shares


def miscalibration(points: ArrayLike, weights: ArrayLike) -> float:
    """The mean absolute difference of `weights` and of what mean rewards `points`, likewise [weights, objectives], got of each."""
    points = checked("points", points, "weights", "objectives")
    weights = checked("weights", weights, "weights", "objectives")
    if weights.shape != points.shape:
        raise InvalidRequest(
            f"weights must have the shape of points, {list(points.shape)}, and have {list(weights.shape)}", param="weights"
        )
    return float(np.abs(got_shares(points) - weights).mean())


def monotonicity(asked: ArrayLike, got: ArrayLike) -> float | None:
    """Spearman's rank correlation of `asked` and `got` [weights]; equal values share their mean rank. None if one is constant."""
    ranks = [_ranks(checked(name, values, "weights")) for name, values in (("asked", asked), ("got", got))]
    if ranks[0].shape != ranks[1].shape:
        raise InvalidRequest(f"got must be one to each of {len(ranks[0])} asked, not {len(ranks[1])}", param="got")
    first, second = (rank - rank.mean() for rank in ranks)
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale else None


def _ranks(values: Array) -> Array:
    below: Array = (values[None, :] < values[:, None]).sum(axis=1) + (values[None, :] == values[:, None]).sum(axis=1) / 2
    return below


def standardise(scores: ArrayLike, mean: ArrayLike, std: ArrayLike) -> Array:
    """`scores` [..., objectives] as standard deviations `std` above `mean`, both [objectives]: the base's on validation prompts."""
    scores = checked("scores", scores)
    mean = checked("mean", mean, "objectives")
    std = checked("std", std, "objectives")
    _same_objectives("mean", mean, scores)
    _same_objectives("std", std, scores)
    if (std <= 0).any():
        index = int(np.argmax(std <= 0))
        raise InvalidRequest(
            f"std[{index}] is {std[index]:g}: only rewards that differ have a standard deviation above 0, by which to standardise",
            param="std",
        )
    return (scores - mean) / std


def length_controlled(rewards: ArrayLike, tokens: ArrayLike, at: float | None = None) -> Array:
    """One method's `rewards` [answers] by one judge as if every answer had `at` tokens, and not its own `tokens` [answers].

    The residual of a linear regression of reward on length, plus what the regression predicts at that length: to compare methods,
    give the mean length of the base's answers; without `at` it is that of these. A straight line fitted to what occurs together
    knows no causes: an answer that is better because it says more loses, too, and at a length that hardly occurs the line is a
    guess. Answers of one length leave nothing to fit, and keep their rewards.
    """
    rewards = checked("rewards", rewards, "answers")
    tokens = checked("tokens", tokens, "answers")
    if tokens.shape != rewards.shape:
        raise InvalidRequest(f"tokens must be one to each of {len(rewards)} rewards, not {len(tokens)}", param="tokens")
    at = float(tokens.mean() if at is None else checked("at", at))
    centred = tokens - tokens.mean()
    variation = float(centred @ centred)
    slope = float(centred @ rewards) / variation if variation else 0.0
    return rewards - slope * (tokens - at)


def agreement(a: ArrayLike, b: ArrayLike) -> float:
    """The share of pairs of answers to the same prompt that two judges order alike, by rewards `a` and `b` [prompts, answers].

    Two who both find a pair equal agree on it; where only one does, it counts half. So one who finds all answers equal agrees in
    0.5 with one who never does, as a coin would.
    """
    a = checked("a", a, "prompts", "answers")
    b = checked("b", b, "prompts", "answers")
    if b.shape != a.shape:
        raise InvalidRequest(f"a and b must be of one shape, not {list(a.shape)} and {list(b.shape)}", param="b")
    if a.shape[1] < 2:
        raise InvalidRequest("a and b must hold at least two answers to each prompt: one cannot be ordered", param="a")
    first, second = np.triu_indices(a.shape[1], k=1)
    apart = np.abs(np.sign(a[:, first] - a[:, second]) - np.sign(b[:, first] - b[:, second]))
    return float(1 - apart.mean() / 2)


def checked(name: str, values: ArrayLike, *axes: str) -> Array:
    """The values as an array with these axes, none of them empty; without `axes`, with any.

    Raises InvalidRequest, which names the array, for another shape and for the first number that is not finite.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name} must be numbers in an array{_expected(axes)}: {error}", param=name) from error
    if array.size == 0 or (axes and array.ndim != len(axes)):
        raise InvalidRequest(
            f"{name} must be an array{_expected(axes)}, none of its axes empty: this one is {list(array.shape)}", param=name
        )
    if not np.isfinite(array).all():
        index = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise InvalidRequest(f"{name}{list(index) or ''} is {array[index]}: it must be a finite number", param=name)
    return array


def _expected(axes: tuple[str, ...]) -> str:
    return f" [{', '.join(axes)}]" if axes else ""


def _same_objectives(name: str, array: NDArray[Any], scores: NDArray[Any]) -> None:
    if array.shape[-1] != scores.shape[-1]:
        raise InvalidRequest(f"{name} has {array.shape[-1]} objectives, the rewards have {scores.shape[-1]}", param=name)
