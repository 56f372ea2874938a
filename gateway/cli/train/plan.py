"""What `sipo train` trains: from a method, its options and its data to one run per policy. Nothing is written here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.cli.train.data import Labelled, Pairs
from services.common.settings import CommonSettings
from sipo.errors import InvalidRequest, InvalidWeights
from sipo.models import model_sha256, resolve_model
from sipo.policies import BaseModelRef, PolicySet
from sipo.preferences import Weights, check_objectives, normalize_weights, parse_weights
from sipo.prompts import PromptFormat
from sipo.training.data import TrainingPair, alignment_pairs, tokenise
from sipo.training.methods import lw_pairs, modpo_margins
from sipo.training.presets import Preset, changed
from sipo.training.settings import Method, TrainRun, TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDS: Mapping[Method, tuple[str, ...]] = {"dpo": (), "sipo": ("start",), "lw": ("weights",), "modpo": ("weights", "start")}
TAKES: Mapping[Method, tuple[str, ...]] = {
    "dpo": ("objectives", "publish"),
    "sipo": ("objectives", "publish"),
    "lw": (),
    "modpo": ("objective",),
}


@dataclass(frozen=True)
class Options:
    """Those that some methods have, as they were written."""

    start: str | None
    objectives: str | None
    weights: str | None
    objective: str | None
    publish: str | None


def method_for(method: Method | None, data: Labelled | Pairs, options: Options) -> Method:
    """The method asked for, or the data's own. Raises InvalidRequest where method, data and options do not fit together."""
    paired = isinstance(data, Pairs)
    chosen: Method = method or ("sipo" if paired else "dpo")
    if paired != (chosen == "sipo"):
        wanted, found = ("pairs", "labelled data") if chosen == "sipo" else ("labelled data", "pairs")
        other = "dpo, lw and modpo take" if chosen == "sipo" else "sipo takes"
        raise InvalidRequest(f"the method {chosen} takes {wanted}, and the file holds {found}, which {other}", param="method")
    given = {name for name, value in asdict(options).items() if value is not None}
    if missing := [name for name in NEEDS[chosen] if name not in given]:
        raise InvalidRequest(f"the method {chosen} needs --{missing[0]}", param=missing[0])
    taken = (*NEEDS[chosen], *TAKES[chosen])
    if surplus := sorted(given - {*taken}):
        known = ", ".join(f"--{name}" for name in taken)
        raise InvalidRequest(f"the method {chosen} has no --{surplus[0]}, but {known}", param=surplus[0])
    return chosen


@dataclass(frozen=True)
class Base:
    """The model of SIPO_MODEL."""

    folder: Path
    ref: BaseModelRef
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(cls, settings: CommonSettings) -> Base:
        """Its weights stay on disk: training runs load them."""
        folder = resolve_model(settings.model, settings.cache_dir)
        ref = BaseModelRef(name=settings.model, sha256=model_sha256(folder, settings.cache_dir))
        from transformers import AutoTokenizer

        return cls(folder, ref, AutoTokenizer.from_pretrained(folder))


@dataclass(frozen=True)
class PlannedRun:
    """One policy's. `name` is that of its folder."""

    name: str
    run: TrainRun
    pairs: Sequence[TrainingPair]


@dataclass(frozen=True)
class Planner:
    """`start` is the policy set that sipo goes on from, and whose policies are MODPO's margins; `given` wins over the preset."""

    base: Base
    start: PolicySet | None
    preset: Preset
    given: TrainSettings

    def __post_init__(self) -> None:
        if self.start is not None:
            self.start.check_base(self.base.ref.sha256)
            self.start.manifest.prompt_format.check(self.base.tokenizer)

    def runs(self, method: Method, data: Labelled | Pairs, options: Options) -> list[PlannedRun]:
        """Those of a method that fits its data and its options: see method_for."""
        if isinstance(data, Pairs):
            return self.sipo(data, options.objectives)
        if options.weights is None:
            return self.dpo(data, options.objectives)
        return self.lw(data, options.weights) if method == "lw" else self.modpo(data, options.weights, options.objective)

    def dpo(self, data: Labelled, objectives: str | None) -> list[PlannedRun]:
        """Eq. 2: a fresh LoRA for each objective."""
        names = _chosen(objectives, data.objectives, "the file has labels for")
        check_objectives(names)
        return [self._run("dpo", name, name, self._alignment, alignment_pairs(data.examples, name)) for name in names]

    def sipo(self, data: Pairs, objectives: str | None) -> list[PlannedRun]:
        """Eq. 8: each of the set's policies goes on, itself frozen as reference."""
        assert self.start is not None
        data.check_objectives(self.start.objectives, self.start.id)
        names = _chosen(objectives, self.start.objectives, f"{self.start.id} has policies for")
        return [
            self._run("sipo", name, name, self.preset.sipo_for(name), data.of(name), start=self.start.adapter_dir(name))
            for name in names
        ]

    def lw(self, data: Labelled, weights: str) -> list[PlannedRun]:
        """Each objective's loss by its weight, on the same pairs."""
        self._check_divergence("lw")
        by_name = _weights(weights, data)
        return [self._run("lw", "lw", "lw", self._alignment, lw_pairs(data.examples, by_name), weights=by_name)]

    def modpo(self, data: Labelled, weights: str, objective: str | None) -> list[PlannedRun]:
        """The pairs of one objective, by default of the heaviest, and the set's policies for the others as margins."""
        assert self.start is not None
        self._check_divergence("modpo")
        by_name = _weights(weights, data)
        own = objective or max(by_name, key=by_name.__getitem__)
        if own not in by_name:
            raise InvalidWeights(f"--objective is {own!r}, which has no weight: it must be one of {', '.join(by_name)}")
        others = [name for name, weight in by_name.items() if name != own and weight > 0]
        if missing := [name for name in others if name not in self.start.objectives]:
            known = ", ".join(self.start.objectives)
            raise InvalidRequest(f"{self.start.id} has no policy for {missing[0]!r}, but for {known}", param="start")
        adapters = {name: self.start.adapter_dir(name) for name in others}
        beta = changed(self._alignment, self.given).beta
        margins = modpo_margins(by_name, own, adapters, beta_ratio=self.start.manifest.beta / beta)
        pairs = alignment_pairs(data.examples, own)
        return [self._run("modpo", "modpo", own, self._alignment, pairs, weights=by_name, margins=margins)]

    def _check_divergence(self, method: Method) -> None:
        divergence = changed(self._alignment, self.given).divergence
        if divergence != "reverse_kl":
            raise InvalidRequest(f"the method {method} is defined for reverse_kl, not for {divergence}", param="settings")

    @property
    def _alignment(self) -> TrainSettings:
        if self.given.model_fields_set & {"alpha"} and self.given.alpha > 0:
            raise InvalidRequest("alpha is the weight of the NLL term in Eq. 8: only the method sipo has it", param="settings")
        return self.preset.alignment

    def _run(
        self,
        method: Method,
        name: str,
        objective: str,
        settings: TrainSettings,
        pairs: Iterable[TrainingPair],
        **fields: Any,
    ) -> PlannedRun:
        base, start = self.base, self.start
        run = TrainRun(
            method=method,
            objective=objective,
            base=base.folder,
            base_name=base.ref.name,
            prompt_format=PromptFormat.of(base.tokenizer) if start is None else start.manifest.prompt_format,
            settings=changed(settings, self.given),
            **fields,
        )
        planned = PlannedRun(name, run, list(pairs))
        self._check_usable(planned)
        return planned

    def _check_usable(self, planned: PlannedRun) -> None:
        """Raises InvalidRequest if not even one pair can be trained on: better now than after the other policies' runs."""
        limits = planned.run.settings
        first = tokenise(
            planned.pairs,
            planned.run.prompt_format,
            self.base.tokenizer,
            max_prompt_tokens=limits.max_prompt_tokens,
            max_response_tokens=limits.max_response_tokens,
            max_pairs=1,
            seed=limits.seed,
        )
        if not first.train:
            raise InvalidRequest(
                f"no pair to train {planned.name!r} on: of {len(planned.pairs)} pairs {first.left_out['prompts_too_long']} have "
                f"prompts longer than max_prompt_tokens = {limits.max_prompt_tokens}, in {first.left_out['identical']} chosen and "
                "rejected are the same"
            )


def _chosen(objectives: str | None, known: Sequence[str], owner: str) -> list[str]:
    names = list(known) if objectives is None else list(dict.fromkeys(name.strip() for name in objectives.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise InvalidRequest(f"unknown objective {unknown[0]!r}: {owner} {', '.join(known)}", param="objectives")
    return names


def _weights(text: str, data: Labelled) -> Weights:
    """Those that are named are the method's objectives."""
    weights = parse_weights(text, param="weights")
    _chosen(",".join(weights), data.objectives, "the file has labels for")
    return normalize_weights(weights, list(weights), param="weights")
