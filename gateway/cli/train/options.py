"""What the options of `sipo train` ask for: a method that fits the data, and its runs (sipo.training.planning)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sipo.conversation import as_json
from sipo.datasets import Dataset, Pair
from sipo.errors import InvalidData, InvalidRequest, InvalidWeights
from sipo.policies import POLICY_NAME
from sipo.preferences import BASE, Weights, check_objectives, normalize_weights, parse_weights
from sipo.training.data import TrainingPair
from sipo.training.planning import PlannedRun, Planner
from sipo.training.presets import Preset, changed
from sipo.training.settings import Method, TrainSettings

NEEDS: Mapping[Method, tuple[str, ...]] = {"dpo": (), "sipo": ("start",), "lw": ("weights",), "modpo": ("weights", "start")}
TAKES: Mapping[Method, tuple[str, ...]] = {
    "dpo": ("objectives", "publish", "reference"),
    "sipo": ("objectives", "publish"),
    "lw": ("reference",),
    "modpo": ("objective",),
}
WITHOUT_OBJECTIVE = (
    "name no objective: give a file for each, as helpful=FILE harmless=FILE, or a column `objective`; or go on from policies with "
    "--start NAME"
)


@dataclass(frozen=True)
class Options:
    """Those that some methods have, as they were written."""

    start: str | None
    reference: Path | None
    objectives: str | None
    weights: str | None
    objective: str | None
    publish: str | None


def method_for(method: Method | None, data: Dataset, options: Options) -> Method:
    """The method asked for, or the data's own. Raises InvalidRequest where method, data and options do not fit together."""
    pairs = [row for row in data.rows if isinstance(row, Pair)]
    of_objectives = all(pair.objective is not None for pair in pairs)
    chosen: Method = method or ("sipo" if pairs and (options.start is not None or not of_objectives) else "dpo")
    if chosen == "sipo" and not pairs:
        raise InvalidRequest(
            f"the method sipo takes pairs, and the data is labelled ({data.format}), which dpo, lw and modpo take", param="method"
        )
    if chosen != "sipo" and not of_objectives:
        raise InvalidRequest(f"the method {chosen} takes labelled data, and these pairs {WITHOUT_OBJECTIVE}", param="method")
    given = {name for name, value in asdict(options).items() if value is not None}
    if missing := [name for name in NEEDS[chosen] if name not in given]:
        hint = f": these pairs {WITHOUT_OBJECTIVE}" if chosen == "sipo" and not of_objectives else ""
        raise InvalidRequest(f"the method {chosen} needs --{missing[0]}{hint}", param=missing[0])
    taken = (*NEEDS[chosen], *TAKES[chosen])
    if surplus := sorted(given - {*taken}):
        known = ", ".join(f"--{name}" for name in taken)
        hint = ": its reference is that of --start" if surplus[0] == "reference" else ""
        raise InvalidRequest(f"the method {chosen} has no --{surplus[0]}, but {known}{hint}", param=surplus[0])
    return chosen


@dataclass(frozen=True)
class Settings:
    """Of each method: a preset's, over which `given` ones win."""

    preset: Preset
    given: TrainSettings

    @property
    def alignment(self) -> TrainSettings:
        if self.given.model_fields_set & {"alpha"} and self.given.alpha > 0:
            raise InvalidRequest("alpha is the weight of the NLL term in Eq. 8: only the method sipo has it", param="settings")
        return changed(self.preset.alignment, self.given)

    def sipo_for(self, objective: str) -> TrainSettings:
        return changed(self.preset.sipo_for(objective), self.given)


def plan(planner: Planner, method: Method, data: Dataset, options: Options, settings: Settings) -> list[PlannedRun]:
    """The runs of a method that fits its data and its options: see method_for."""
    if method == "sipo":
        return _sipo(planner, data, options.objectives, settings)
    examples = data.labelled()
    known = list(dict.fromkeys(name for example in examples for name in example.labels))
    if options.weights is None:
        objectives = _chosen(options.objectives, known, "the data has labels for")
        check_objectives(objectives)
        return [planner.dpo(objective, examples, settings.alignment) for objective in objectives]
    weights = _weights(options.weights, known)
    if method == "lw":
        return [planner.lw(weights, examples, settings.alignment)]
    return [planner.modpo(_own(options.objective, weights), weights, examples, settings.alignment)]


def check_publishable(name: str, runs: Sequence[PlannedRun]) -> None:
    """Raises InvalidRequest for what publishing would refuse, before hours of training."""
    if not POLICY_NAME.fullmatch(name) or name == BASE:
        raise InvalidRequest(f"--publish {name!r} is no policy name: small letters, digits, - and _; not {BASE!r}")
    if len(runs) < 2:
        raise InvalidRequest(f"--publish needs two or more objectives, here is {runs[0].name} alone")


def _sipo(planner: Planner, data: Dataset, objectives: str | None, settings: Settings) -> list[PlannedRun]:
    assert planner.start is not None
    start = planner.start
    for line, row in zip(data.lines, data.rows, strict=True):
        if isinstance(row, Pair) and row.objective not in (None, *start.objectives):
            known = ", ".join(start.objectives)
            raise InvalidData(f"`objective` is {row.objective!r}: {start.id} has {known}", line=line)

    def pairs_of(objective: str) -> Iterator[TrainingPair]:
        for row in data.rows:
            if isinstance(row, Pair) and row.objective in (None, objective):
                yield TrainingPair(prompt=as_json(row.prompt), chosen=row.chosen, rejected=row.rejected)

    names = _chosen(objectives, start.objectives, f"{start.id} has policies for")
    return [planner.sipo(name, pairs_of(name), settings.sipo_for(name)) for name in names]


def _own(objective: str | None, weights: Weights) -> str:
    """Whose pairs MODPO trains on: by default the heaviest's."""
    own = objective or max(weights, key=weights.__getitem__)
    if own not in weights:
        raise InvalidWeights(f"--objective is {own!r}, which has no weight: it must be one of {', '.join(weights)}")
    return own


def _chosen(objectives: str | None, known: Sequence[str], owner: str) -> list[str]:
    names = list(known) if objectives is None else list(dict.fromkeys(name.strip() for name in objectives.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise InvalidRequest(f"unknown objective {unknown[0]!r}: {owner} {', '.join(known)}", param="objectives")
    return names


def _weights(text: str, known: Sequence[str]) -> Weights:
    """Those that are named are the method's objectives."""
    weights = parse_weights(text, param="weights")
    _chosen(",".join(weights), known, "the data has labels for")
    return normalize_weights(weights, list(weights), param="weights")
