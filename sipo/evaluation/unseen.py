"""Weights that count for no front: whether a method holds between those that were measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sipo.evaluation.indicators import Array
from sipo.evaluation.measured import Made, Measure
from sipo.evaluation.report import UnseenWeight


def at_unseen(seen: Made, unseen: Made, objectives: Sequence[str], measure: Measure) -> list[UnseenWeight]:
    """Of one method's answers at both."""
    asked, found = seen.weights(objectives), []
    for weights, row, scores in zip(unseen.points, unseen.weights(objectives), unseen.scores, strict=True):
        assert weights is not None, "only methods that know weights have unseen ones"
        share = _interpolation(asked[:, 0], row[0]) if len(objectives) == 2 else None
        products = scores @ row
        expected = None if share is None else np.einsum("p,pno,o->n", share, seen.scores, row)
        found.append(
            UnseenWeight(
                weights=weights,
                rewards=measure.means(scores, objectives),
                inner_product=measure.mean(products),
                gap=None if expected is None else measure.mean(products - expected),
            )
        )
    return found


def _interpolation(seen: Array, at: float) -> Array | None:
    """What each of the seen weights [points] has in the linear interpolation at this one; None outside of them."""
    if not seen.min() <= at <= seen.max():
        return None
    order = np.argsort(seen)
    shares = np.zeros(len(seen))
    for position, point in enumerate(order):
        peak = np.zeros(len(seen))
        peak[position] = 1
        shares[point] = np.interp(at, seen[order], peak)
    return shares
