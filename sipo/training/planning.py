"""What each method trains, as runs that may be begun: see sipo.training.methods. Nothing is written here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipo.datasets.doubts import doubtful_pairs
from sipo.errors import InvalidRequest
from sipo.models import Base
from sipo.policies import PolicySet, adapter_sha256
from sipo.preferences import Example, Weights
from sipo.training.data import TrainingPair, alignment_pairs, tokenise
from sipo.training.methods import lw_pairs, modpo_margins
from sipo.training.settings import Method, SftRun, TrainRun, TrainSettings
from sipo.words import counted, share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlannedRun:
    """One policy's. `name` is that of its folder."""

    name: str
    run: TrainRun
    pairs: Sequence[TrainingPair]

    def account(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What will be left out of the run, by which setting, and what looks wrong in its pairs: a sentence each.

        Raises InvalidRequest if not even one pair can be trained on: better now than after the other policies' runs.
        """
        limits, total = self.run.settings, len(self.pairs)
        tokens = tokenise(
            self.pairs,
            self.run.prompt_format,
            tokenizer,
            max_prompt_tokens=limits.max_prompt_tokens,
            max_response_tokens=limits.max_response_tokens,
            max_pairs=None,
            seed=limits.seed,
        )
        long, identical, cut = (tokens.left_out[reason] for reason in ("prompts_too_long", "identical", "responses_cut"))
        usable = total - long - identical
        if not usable:
            raise InvalidRequest(
                f"no pair to train {self.name!r} on: of {counted(total, 'pair')} {long} have prompts longer than "
                f"max_prompt_tokens = {limits.max_prompt_tokens}, in {identical} chosen and rejected are the same"
            )
        said = []
        if long:
            said.append(
                f"{share(long, total, 'pair')} left out: the prompt is longer than max_prompt_tokens = {limits.max_prompt_tokens}"
            )
        if identical:
            said.append(f"{share(identical, total, 'pair')} left out: chosen and rejected are the same")
        if cut:
            said.append(f"{counted(cut, 'response')} cut: longer than max_response_tokens = {limits.max_response_tokens}")
        if limits.max_pairs is not None and limits.max_pairs < usable:
            said.append(f"{share(limits.max_pairs, usable, 'pair')} drawn: max_pairs = {limits.max_pairs}")
        return said + doubtful_pairs((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in self.pairs)


@dataclass(frozen=True)
class Planner:
    """Plans runs on one base. `start` is the policy set that sipo goes on from, and whose policies are MODPO's margins; its prompt
    format and its reference are then those of every run. `reference` is the folder of an adapter that makes the reference of the
    base where there is no set yet.

    Raises IncompatiblePolicy if either belongs to another base, InvalidRequest for a reference that is not that of `start`.
    """

    base: Base
    start: PolicySet | None = None
    reference: Path | None = None

    def __post_init__(self) -> None:
        if self.reference is not None:
            # torch takes seconds to import, and planning without a reference does without
            from sipo.lora import check_base, load_adapter

            check_base(load_adapter(self.reference), self.base.folder)
        if self.start is not None:
            self.start.check_base(self.base.ref.sha256)
            self.start.manifest.prompt_format.check(self.base.tokenizer)
            known = self.start.manifest.reference
            if self.reference is not None and (known is None or known.sha256 != adapter_sha256(self.reference)):
                raise InvalidRequest(
                    f"{self.reference} is not the reference of {self.start.id}, which its policies lie on: leave it out",
                    param="reference",
                )

    def dpo(self, objective: str, examples: Iterable[Example], settings: TrainSettings) -> PlannedRun:
        """Eq. 2: a fresh LoRA on the objective's labels."""
        return self._run("dpo", objective, objective, alignment_pairs(examples, objective), settings)

    def sipo(self, objective: str, pairs: Iterable[TrainingPair], settings: TrainSettings) -> PlannedRun:
        """Eq. 8: the set's policy goes on, itself frozen as reference."""
        assert self.start is not None
        return self._run("sipo", objective, objective, pairs, settings, start=self.start.adapter_dir(objective))

    def lw(self, weights: Weights, examples: Iterable[Example], settings: TrainSettings) -> PlannedRun:
        """Each objective's loss by its weight, on the same pairs."""
        _check_divergence("lw", settings)
        return self._run("lw", "lw", "lw", lw_pairs(examples, weights), settings, weights=weights)

    def modpo(self, objective: str, weights: Weights, examples: Iterable[Example], settings: TrainSettings) -> PlannedRun:
        """The pairs of one objective, and the set's policies for the others as margins."""
        assert self.start is not None
        _check_divergence("modpo", settings)
        others = [name for name, weight in weights.items() if name != objective and weight > 0]
        if missing := [name for name in others if name not in self.start.objectives]:
            known = ", ".join(self.start.objectives)
            raise InvalidRequest(f"{self.start.id} has no policy for {missing[0]!r}, but for {known}", param="start")
        adapters = {name: self.start.adapter_dir(name) for name in others}
        margins = modpo_margins(weights, objective, adapters, beta_ratio=self.start.manifest.beta / settings.beta)
        pairs = alignment_pairs(examples, objective)
        return self._run("modpo", "modpo", objective, pairs, settings, weights=weights, margins=margins)

    def _run(
        self, method: Method, name: str, objective: str, pairs: Iterable[TrainingPair], settings: TrainSettings, **fields: Any
    ) -> PlannedRun:
        reference = self.reference if self.start is None else self.start.reference_dir
        run = TrainRun(
            method=method,
            objective=objective,
            base=self.base.folder,
            base_name=self.base.ref.name,
            prompt_format=self.base.prompt_format if self.start is None else self.start.manifest.prompt_format,
            reference=reference,
            reference_sha256=None if reference is None else adapter_sha256(reference),
            settings=settings,
            **fields,
        )
        return PlannedRun(name, run, list(pairs))


def fine_tuning(base: Base, settings: TrainSettings) -> SftRun:
    return SftRun(
        base=base.folder,
        base_name=base.ref.name,
        base_sha256=base.ref.sha256,
        prompt_format=base.prompt_format,
        settings=settings,
    )


def _check_divergence(method: Method, settings: TrainSettings) -> None:
    if settings.divergence != "reverse_kl":
        raise InvalidRequest(f"the method {method} is defined for reverse_kl, not for {settings.divergence}", param="settings")
