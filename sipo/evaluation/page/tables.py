"""The page's tables as data: what they say is decided here, how they look in page.html."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sipo.datasets import ConflictReport
from sipo.evaluation.comparing import certain
from sipo.evaluation.job_account import JobAccount, RoundShown, TrainingShown
from sipo.evaluation.page.words import (
    FEWEST_DISTINCT,
    MOST_EMPTY,
    MOST_TRUNCATED,
    between,
    compared,
    duration,
    number,
    p_number,
    percent,
    places,
    signed_percent,
    weight,
    weight_names,
)
from sipo.evaluation.report import AtWeight, Comparison, EvaluationReport, Improvement, Interval


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Group:
    """Rows under a heading of their own; each row begins with its name."""

    heading: str | None
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Table:
    caption: str
    columns: list[str]
    groups: list[Group]


def by_weight(report: EvaluationReport) -> Table:
    points = [point for method in report.methods for point in method.points]
    reward_places = {name: places(point.rewards[name] for point in points) for name in report.objectives}
    token_places = places(point.tokens for point in points)
    with_originals = any(point.dominating for point in points)
    names = weight_names(report) if len(report.objectives) > 2 else {}

    def name(point: AtWeight) -> str:
        words = weight(point.weights)
        return f"{names[words]}: {words}" if words in names else words

    def cells(point: AtWeight, on_front: bool) -> list[Cell]:
        return [
            *(_interval(point.rewards[objective], reward_places[objective]) for objective in report.objectives),
            Cell("yes" if on_front else "no"),
            _interval(point.tokens, token_places),
            Cell(percent(point.truncated), bad=point.truncated > MOST_TRUNCATED),
            Cell(percent(point.empty), bad=point.empty > MOST_EMPTY),
            Cell(percent(point.distinct), bad=point.distinct < FEWEST_DISTINCT),
            *([_share(point.dominating)] if with_originals else []),
        ]

    return Table(
        caption="Every method at every weight: mean rewards and lengths with 95 % intervals, and shares of the answers. "
        "⚠: see the warnings.",
        columns=[
            "Weights",
            *report.objectives,
            "On its front",
            "Tokens",
            "Truncated",
            "Empty",
            "Distinct",
            *(["Beat both originals"] if with_originals else []),
        ],
        groups=[
            Group(method.name, [(name(point), cells(point, index in method.front)) for index, point in enumerate(method.points)])
            for method in report.methods
        ],
    )


def indicators(report: EvaluationReport) -> Table:
    def column(intervals: Iterable[Interval | None]) -> list[Cell]:
        intervals = list(intervals)
        decimals = places(filter(None, intervals))
        return [Cell("–") if interval is None else _interval(interval, decimals) for interval in intervals]

    columns = {
        "Hypervolume": column(method.hypervolume for method in report.methods),
        "IGD+": column(method.igd_plus for method in report.methods),
        "Inner product": column(method.inner_product for method in report.methods),
    }
    columns |= {
        f"Spread of {objective}": [Cell(number(method.spread[objective], 3)) for method in report.methods]
        for objective in report.objectives
    }
    rows = zip(*columns.values(), strict=True)
    return Table(
        caption="Indicators of each front, with 95 % intervals. Hypervolume: more is better. IGD+: how far the common front of all "
        "methods is from this one, 0 is best. Inner product: mean of weight times mean reward, more is better. Spread: from the "
        "least to the greatest mean reward.",
        columns=["Method", *columns],
        groups=[Group(None, [(method.name, list(cells)) for method, cells in zip(report.methods, rows, strict=True)])],
    )


def calibration(report: EvaluationReport) -> Table:
    methods = [(method.name, method.calibration) for method in report.methods if method.calibration]
    decimals = places(found.difference for _, found in methods)
    return Table(
        caption="Difference: mean absolute difference of the weight asked and the share got, 0 is best. Monotonicity: Spearman’s "
        "rank correlation of weight and mean reward, 1 is best.",
        columns=["Method", "Difference", *(f"Monotonicity of {objective}" for objective in report.objectives)],
        groups=[
            Group(
                None,
                [
                    (
                        name,
                        [
                            _interval(found.difference, decimals),
                            *(_figure(found.monotonicity[one], 2) for one in report.objectives),
                        ],
                    )
                    for name, found in methods
                ],
            )
        ],
    )


def comparisons(report: EvaluationReport) -> Table:
    """By two families, their seeds one by one."""
    decimals = places(one.difference for one in report.comparisons)

    def cells(one: Comparison) -> list[Cell]:
        return [_interval(one.difference, decimals), Cell(p_number(one.p_value)), Cell("yes" if certain(one) else "no")]

    return Table(
        caption="Differences of hypervolumes, on the same prompts and as many weights, with 95 % intervals; p corrected over all "
        "of them (Holm). A method wins where each seed’s difference is certain and above 0.",
        columns=["Method and other", "Hypervolume", "p", "Certain"],
        groups=[
            Group(
                f"{verdict.method} against {verdict.against}: {verdict.verdict}",
                [(f"{one.method}, {one.against}", cells(one)) for one in compared(verdict, report)],
            )
            for verdict in report.verdicts
        ],
    )


def improvements(report: EvaluationReport) -> Table:
    every = [one for comparison in report.comparisons for one in comparison.improvements]
    reward_places = {name: places(one.rewards[name] for one in every) for name in report.objectives}
    average_places = places(one.average for one in every)
    with_originals = any(one.dominating for one in every)

    def cells(one: Improvement) -> list[Cell]:
        return [
            _interval(one.average, average_places),
            *(
                cell
                for name in report.objectives
                for cell in (_interval(one.rewards[name], reward_places[name]), _part(one.relative[name]))
            ),
            *([_points(one.dominating), _part(one.relative_dominating)] if with_originals else []),
        ]

    return Table(
        caption="What a method’s mean rewards have over another’s at each weight, on the same prompts, with 95 % intervals. RI: in "
        "parts of the other’s mean, in the judge’s own unit, which says little near 0.",
        columns=[
            "Weights",
            "All objectives",
            *(column for name in report.objectives for column in (name, "RI")),
            *(["Beat both originals", "RI"] if with_originals else []),
        ],
        groups=[
            Group(f"{one.method} over {one.against}", [(weight(found.weights), cells(found)) for found in one.improvements])
            for one in report.comparisons
            if one.improvements
        ],
    )


def originals(report: EvaluationReport) -> Table:
    """Table 2: the two responses of the data, and every method over the better of them."""
    rows = [
        (f"better in {name}", [Cell(number(row[other], 3)) for other in report.objectives] + [Cell("")] * len(report.objectives))
        for name, row in report.originals.items()
    ]
    standards = [report.standardised.get(name, (0.0, 1.0)) for name in report.objectives]

    def cells(point: AtWeight, over: dict[str, float | None]) -> list[Cell]:
        raw = [
            mean + deviation * point.rewards[name].value
            for name, (mean, deviation) in zip(report.objectives, standards, strict=True)
        ]
        return [*(Cell(number(value, 3)) for value in raw), *(_part(over[name]) for name in report.objectives)]

    return Table(
        caption="Mean rewards of the data’s own responses (of each two the one that an objective’s judge finds better) and of all "
        "methods, in the judges’ own units. RI: over the best of the original rows, in parts of it.",
        columns=["", *report.objectives, *(f"RI of {name}" for name in report.objectives)],
        groups=[
            Group("Original responses", rows),
            *(
                Group(
                    method.name,
                    [(weight(one.weights), cells(one, one.over_originals)) for one in method.points if one.over_originals],
                )
                for method in report.methods
            ),
        ],
    )


def unseen(report: EvaluationReport) -> Table:
    every = [one for method in report.methods for one in method.unseen]
    reward_places = {name: places(one.rewards[name] for one in every) for name in report.objectives}
    product_places = places(one.inner_product for one in every)
    return Table(
        caption="Weights that count for no front. Gap: the inner product less that of the neighbouring measured weights, "
        "interpolated linearly; where it is below 0, a front between measured weights is not what it seems.",
        columns=["Weights", *report.objectives, "Inner product", "Gap"],
        groups=[
            Group(
                method.name,
                [
                    (
                        weight(one.weights),
                        [
                            *(_interval(one.rewards[name], reward_places[name]) for name in report.objectives),
                            _interval(one.inner_product, product_places),
                            Cell("–") if one.gap is None else _interval(one.gap, product_places),
                        ],
                    )
                    for one in method.unseen
                ],
            )
            for method in report.methods
            if method.unseen
        ],
    )


def side_effects(report: EvaluationReport) -> Table:
    points = [point for method in report.methods for point in method.points]
    decimals = {name: places(point.also[name] for point in points) for name in report.also}
    compared = any(point.also_difference for point in points)
    return Table(
        caption="What no objective asks for, by judges of its own, in their own units, with 95 % intervals"
        + ("; differences are to the base, on the same prompts." if compared else "."),
        columns=["Weights", *(column for name in report.also for column in (name, *(["Difference"] if compared else [])))],
        groups=[
            Group(
                method.name,
                [
                    (
                        weight(point.weights),
                        [
                            _interval(values[name], decimals[name])
                            for name in report.also
                            for values in (point.also, *([point.also_difference] if compared else []))
                        ],
                    )
                    for point in method.points
                ],
            )
            for method in report.methods
        ],
    )


def lengths_and_divergence(report: EvaluationReport) -> Table:
    points = [point for method in report.methods for point in method.points]
    decimals = {name: places(point.length_controlled[name] for point in points) for name in report.objectives}
    diverged = [point.divergence for point in points if point.divergence]
    return Table(
        caption="Mean rewards as if all answers were as long as the base’s are on average, by a line through reward and "
        "length at each weight; a guess, with a wide interval, where answers of that length are rare."
        + (" KL: of the policy from its reference, mean per token, in nats." if diverged else ""),
        columns=["Weights", *report.objectives, *(["KL"] if diverged else [])],
        groups=[
            Group(
                method.name,
                [
                    (
                        weight(point.weights),
                        [
                            *(_interval(point.length_controlled[name], decimals[name]) for name in report.objectives),
                            *(
                                [_interval(point.divergence, places(diverged)) if point.divergence else Cell("–")]
                                if diverged
                                else []
                            ),
                        ],
                    )
                    for point in method.points
                ],
            )
            for method in report.methods
        ],
    )


def agreement(report: EvaluationReport) -> Table:
    return Table(
        caption="Of two different answers to one prompt, how often the judge finds that one better which the exact function does.",
        columns=["Objective", "Agreement"],
        groups=[Group(None, [(name, [_share(found)]) for name, found in report.agreement.items()])],
    )


def data(reports: Mapping[str, ConflictReport]) -> Table:
    def rows(found: ConflictReport) -> list[tuple[str, list[Cell]]]:
        pairs = [(f"{one.first} and {one.second}", one.rows, one.conflicting) for one in found.pairs]
        counts = pairs if len(pairs) == 1 else [*pairs, ("any two", found.comparable, found.conflicting)]
        return [
            (name, [Cell(f"{of:,}"), Cell(f"{conflicting:,}"), Cell(percent(conflicting / of) if of else "–")])
            for name, of, conflicting in counts
        ]

    return Table(
        caption="How often the objectives of training data prefer different responses.",
        columns=["Objectives", "Rows with both", "Conflicting", "Share"],
        groups=[Group(name, rows(found)) for name, found in reports.items()],
    )


def funnel(job: JobAccount) -> Table:
    """From prompts to pairs, a column a round."""

    def row(name: str, of_round: Callable[[RoundShown], int | None]) -> tuple[str, list[Cell]]:
        return name, [Cell("–" if (count := of_round(one)) is None else f"{count:,}") for one in job.rounds]

    def rejected(rule: str) -> tuple[str, list[Cell]]:
        return row(f"rejected: {rule.replace('_', ' ')}", lambda one: one.rejected.get(rule, 0))

    rules = dict.fromkeys(rule for one in job.rounds for rule in one.rejected)
    return Table(
        caption="From prompts to training pairs",
        columns=["", *(f"Round {one.round}" for one in job.rounds)],
        groups=[
            Group(
                None,
                [
                    row("prompts", lambda one: one.prompts),
                    row("without a decision", lambda one: one.failed),
                    row("candidates", lambda one: one.candidates),
                    *map(rejected, rules),
                    row("prompts with an accepted response", lambda one: one.accepted),
                    row("pairs", lambda one: one.pairs),
                ],
            )
        ],
    )


def account(job: JobAccount) -> Table:
    """What candidates were truly worth."""

    def share(part: int | None, of: int) -> Cell:
        return Cell("–" if part is None or not of else percent(part / of))

    def rows(one: RoundShown) -> list[tuple[str, list[Cell]]]:
        stages = [
            (
                f"made by {stage}",
                [Cell(f"{made.candidates:,}"), share(made.truncated, made.candidates), share(made.truly_better, made.candidates)],
            )
            for stage, made in one.stages.items()
        ]
        best = [] if one.available is None else [("prompts with a better one", [Cell(f"{one.available:,}"), Cell(""), Cell("")])]
        orders = [
            (f"{name}: order of the implicit reward", [Cell(f"{of:,}"), Cell(""), share(right, of)])
            for name, (right, of) in one.order.items()
        ]
        return [*stages, ("accepted", [Cell(f"{one.chosen:,}"), Cell(""), share(one.chosen_better, one.chosen)]), *best, *orders]

    return Table(
        caption="What candidates are worth by the ground truth. Right: better than both originals on every objective; of an "
        "implicit reward’s order, candidates set right against an original.",
        columns=["", "Number", "Truncated", "Right"],
        groups=[Group(f"Round {one.round}", rows(one)) for one in job.rounds if one.stages or one.chosen],
    )


def ground_truth(job: JobAccount) -> Table:
    return Table(
        caption="Mean ground truth of the prompts with an accepted response",
        columns=["", "Response 0", "Response 1", "Accepted"],
        groups=[
            Group(
                f"Round {one.round}",
                [
                    (name, [Cell(number(mean, 3)) for mean in (*means.originals, means.accepted)])
                    for name, means in one.ground_truth.items()
                ],
            )
            for one in job.rounds
            if one.ground_truth
        ],
    )


def trainings(job: JobAccount) -> Table:
    def cells(one: TrainingShown) -> list[Cell]:
        figures = [*one.loss, *(one.accuracy or (None, None))]
        held = "held-out pairs" if one.held_out else "the training pairs"
        return [Cell(f"{one.pairs:,}"), Cell(f"{one.steps:,}"), *(_figure(figure, 3) for figure in figures), Cell(held)]

    rounds = dict.fromkeys(one.round for one in job.trainings)
    return Table(
        caption="Trainings: loss, and accuracy of implicit rewards, before and after",
        columns=["Objective", "Pairs", "Steps", "Loss before", "After", "Accuracy before", "After", "Measured on"],
        groups=[
            Group(
                f"Round {round_}" if round_ else "First alignment",
                [(one.objective, cells(one)) for one in job.trainings if one.round == round_],
            )
            for round_ in rounds
        ],
    )


def seconds(report: EvaluationReport) -> Table:
    return Table(
        caption="Time by stage",
        columns=["Stage", "Time"],
        groups=[Group(None, [(stage, [Cell(duration(seconds))]) for stage, seconds in report.seconds.items()])],
    )


def tokens(report: EvaluationReport) -> Table:
    return Table(
        caption="Tokens generated by method",
        columns=["Method", "Tokens"],
        groups=[Group(None, [(method, [Cell(f"{count:,}")]) for method, count in report.tokens.items()])],
    )


def _interval(interval: Interval, decimals: int) -> Cell:
    return Cell(number(interval.value, decimals), f"({between(interval, decimals)})")


def _figure(value: float | None, decimals: int) -> Cell:
    return Cell("–" if value is None else number(value, decimals))


def _part(value: float | None) -> Cell:
    """A relative improvement."""
    return Cell("–" if value is None else signed_percent(value))


def _points(share: Interval | None) -> Cell:
    """A difference of shares."""
    if share is None:
        return Cell("–")
    return Cell(signed_percent(share.value), f"({signed_percent(share.low)} to {signed_percent(share.high)})")


def _share(share: Interval | None) -> Cell:
    return Cell("–") if share is None else Cell(percent(share.value), f"({percent(share.low)} to {percent(share.high)})")
