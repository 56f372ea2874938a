"""Methods compared in pairs, each with those of the same training seed, and what the seeds say together.

Seeds are never put together by a bootstrap: few trainings are no distribution. A difference counts that every seed shows by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from sipo.errors import InvalidRequest
from sipo.evaluation.bootstrap import difference, drawn, draws, holm
from sipo.evaluation.indicators import Array
from sipo.evaluation.measured import Made, Measure, beat_both, relative
from sipo.evaluation.report import Comparison, Improvement, Verdict, family, seed_of
from sipo.preferences import Weights, format_weights

LEVEL = 0.05
DRAWS = 500
"""For each comparison: a p value is at least 2 / (draws + 1), and Holm's correction multiplies the least by their number."""
MOST_REPORTS = 12
"""Equally large reports that may be corrected together, as an experiment's seeds are: 12 · 2 / 500 is still below LEVEL."""

Families = tuple[str, str]
Pair = tuple[str, str]


def comparisons(names: Sequence[str], against: Sequence[str]) -> dict[Families, list[Pair]]:
    """Which methods are compared with which, by the names of their families: all families with those of `against`, or, where that
    names none, each with all before it. Of two families those methods that have the same seed, or of which one has none.

    Raises InvalidRequest for a family that there is not, and for two without a seed in common.
    """
    families = list(dict.fromkeys(map(family, names)))
    if unknown := next((name for name in against if name not in families), None):
        raise InvalidRequest(f"there is no method {unknown!r} to compare with: there are {', '.join(families)}", param="against")
    pairs = [(later, earlier) for earlier, later in combinations(families, 2)]
    if against:
        wanted = [(name, other) for other in against for name in families if name != other]
        pairs = [pair for index, pair in enumerate(wanted) if pair[::-1] not in wanted[:index] and pair not in wanted[:index]]
    return {pair: _same_seeds(names, *pair) for pair in pairs}


def _same_seeds(names: Sequence[str], one: str, other: str) -> list[Pair]:
    of_one, of_other = ([name for name in names if family(name) == wanted] for wanted in (one, other))
    pairs = [(a, b) for a in of_one for b in of_other if seed_of(a) == seed_of(b) or None in (seed_of(a), seed_of(b))]
    if not pairs:
        raise InvalidRequest(
            f"{one} and {other} have no seed in common, and are compared seed by seed: evaluate both with the same seeds, or name "
            "others in `against`",
            param="against",
        )
    return pairs


def compare(
    made: Sequence[Made],
    pairs: Mapping[Families, Sequence[Pair]],
    objectives: Sequence[str],
    measure: Measure,
    *,
    originals: Array | None,
    seed: int,
) -> tuple[list[Comparison], list[Verdict]]:
    """p values are corrected over all pairs, of all families and seeds. `originals`, if there are any: [2, prompts, objectives]."""
    by_name = {one.method.name: one for one in made}
    asked = [(by_name[name], by_name[other]) for of_families in pairs.values() for name, other in of_families]
    prompts, samples = measure.draws.shape[1], max(len(measure.draws), DRAWS * len(asked))
    more, wanted = draws(prompts, samples, seed), {one.method.name for pair in asked for one in pair}
    volumes = {name: drawn(by_name[name].scores, more, measure.hypervolume) for name in wanted}
    found = [difference(volumes[one.method.name], volumes[other.method.name]) for one, other in asked]
    corrected = holm([uncorrected for _, uncorrected in found])
    compared = [
        Comparison(
            method=one.method.name,
            against=other.method.name,
            difference=difference,
            p_value=p_value,
            uncorrected=uncorrected,
            improvements=_improvements(one, other, objectives, measure, originals),
        )
        for (one, other), (difference, uncorrected), p_value in zip(asked, found, corrected, strict=True)
    ]
    return compared, [verdict(*of_families, compared) for of_families in pairs]


def certain(comparison: Comparison) -> bool:
    """The interval is that of one comparison, the p value knows of all: both must agree."""
    return comparison.p_value < LEVEL and (comparison.difference.low > 0 or comparison.difference.high < 0)


def verdict(method: str, against: str, compared: Sequence[Comparison]) -> Verdict:
    """What those of the comparisons come to that are of these two families."""
    own = [one for one in compared if (family(one.method), family(one.against)) == (method, against)]
    signs = {(one.difference.low > 0) - (one.difference.high < 0) if certain(one) else 0 for one in own}
    seeds = list(dict.fromkeys(seed for one in own for seed in (seed_of(one.method) or seed_of(one.against),) if seed))
    return Verdict(
        method=method,
        against=against,
        seeds=seeds,
        verdict="wins" if signs == {1} else "loses" if signs == {-1} else "not decided",
    )


def _improvements(
    one: Made, other: Made, objectives: Sequence[str], measure: Measure, originals: Array | None
) -> list[Improvement]:
    """At the weights of both; at those of the one that has any, where the other has none."""
    found = []
    for weights, own, its in _same_points(one, other):
        rewards = one.scores[own] - other.scores[its]
        raw, raw_other = one.raw[own].mean(axis=0), other.raw[its].mean(axis=0)
        shares = None if originals is None else (beat_both(one.scores[own], originals), beat_both(other.scores[its], originals))
        found.append(
            Improvement(
                weights=weights,
                rewards=measure.means(rewards, objectives),
                average=measure.mean(rewards.mean(axis=1)),
                relative=relative(raw - raw_other, raw_other, objectives),
                dominating=None if shares is None else measure.mean(shares[0] - shares[1]),
                relative_dominating=None
                if shares is None or not shares[1].any()
                else float(shares[0].mean() / shares[1].mean() - 1),
            )
        )
    return found


def _same_points(one: Made, other: Made) -> list[tuple[Weights | None, int, int]]:
    """Weights, and the indices of both methods' points there."""
    if one.points[0] is None or other.points[0] is None:
        return [
            (weights if weights is not None else its_weights, own, its)
            for own, weights in enumerate(one.points)
            for its, its_weights in enumerate(other.points)
        ]
    places = {format_weights(weights): its for its, weights in enumerate(other.points) if weights is not None}
    return [
        (weights, own, places[format_weights(weights)])
        for own, weights in enumerate(one.points)
        if weights is not None and format_weights(weights) in places
    ]
