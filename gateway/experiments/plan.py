"""What an experiment comes to: each stage once for every seed, with a key of all that it is made from, and a folder of that key.

    <data_dir>/experiments/data-SHA.jsonl                   training data
    <data_dir>/experiments/seed-1/STAGE-KEY/                a stage of one seed
    <data_dir>/experiments/all-seeds/STAGE-KEY/             a stage that is made once for all

Experiments that make the same from the same find each other's stages there, if these have one name. Another setting makes another
key, so a folder is of one content for ever, and what there is of others stays. Code is no part of a key: what a change of the
program spoils is for a person to remove.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gateway.experiments.definition import (
    Align,
    Aligned,
    Evaluate,
    Experiment,
    ExperimentFile,
    Modpo,
    MoreTraining,
    Round,
    Sft,
    Stage,
    Subset,
    Trained,
)
from gateway.experiments.result import Result, read_result
from services.common.contract.jobs import JobSpec
from sipo.evaluation.prompts import TestPrompt, check_unseen
from sipo.files import write_atomically
from sipo.preferences import Example
from sipo.training.settings import TrainSettings

KEY = 12
"""Digits of a key in a folder's name."""
FIXED_SEED = 0
"""Of stages that are made once."""


@dataclass(frozen=True)
class Step:
    """A stage, made once or for one seed. `uses`: the steps that it builds on, by the stage's field; an evaluation's by the
    method's name."""

    stage: Stage
    seed: int | None
    key: str
    folder: Path
    uses: Mapping[str, Step] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return self.stage.name if self.seed is None else f"{self.stage.name}, seed {self.seed}"

    @property
    def training_seed(self) -> int:
        return FIXED_SEED if self.seed is None else self.seed

    def result(self) -> Result | None:
        """None if it is not finished."""
        return read_result(self.folder)


class Plan:
    """`root`: the folder of all experiments. Raises what reading data and prompts raises, and InvalidRequest for prompts that are
    among the training data."""

    def __init__(self, file: ExperimentFile, root: Path, *, examples: Sequence[Example] | None = None) -> None:
        """`examples`: the data, where it is not to be read."""
        self.file = file
        self.root = root
        self.examples = list(file.examples() if examples is None else examples)
        demonstrations = file.demonstrations()
        self.demonstrations = self.examples if demonstrations is None else demonstrations
        self.steps = _Planning(self).steps_of(self.experiment.seeds)

    @property
    def experiment(self) -> Experiment:
        return self.file.experiment

    @cached_property
    def key(self) -> str:
        """Of all that the results of a seed are made from, but for the seed: seeds of one key may be put together."""
        steps = _Planning(self).steps_of([FIXED_SEED])
        return sha256(json.dumps([(step.stage.name, step.stage.seed, step.key) for step in steps]))

    def steps_of(self, seeds: Collection[int]) -> list[Step]:
        """Those of the seeds, with those that are made once for all."""
        return [step for step in self.steps if step.seed is None or step.seed in seeds]

    @cached_property
    def prompts(self) -> list[TestPrompt]:
        prompts = self.file.test_prompts()
        check_unseen(prompts, [example.prompt for example in self.examples], self.experiment.data)
        if self.experiment.demonstrations is not None:
            check_unseen(prompts, [example.prompt for example in self.demonstrations], self.experiment.demonstrations)
        return prompts

    @cached_property
    def lines(self) -> str:
        return jsonl(self.examples)

    @cached_property
    def demonstration_lines(self) -> str:
        return jsonl(self.demonstrations)

    @property
    def data_file(self) -> Path:
        return self._file(self.lines)

    @property
    def demonstrations_file(self) -> Path:
        """The same as data_file, if the data are the demonstrations as well."""
        return self._file(self.demonstration_lines)

    def _file(self, lines: str) -> Path:
        return self.root / f"data-{sha256(lines)[:KEY]}.jsonl"

    def write_data(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for lines in (self.lines, self.demonstration_lines):
            if not (file := self._file(lines)).exists():
                write_atomically(file, lines)


class _Planning:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.experiment = plan.experiment
        self.of_seed: dict[tuple[str, int | None], Step] = {}

    def steps_of(self, seeds: Sequence[int]) -> list[Step]:
        """In the order in which they run: seed by seed, so that the first seed tells how long all will take."""
        for seed in seeds:
            for stage in self.experiment.stages:
                of = None if stage.seed == "fixed" else seed
                if (stage.name, of) not in self.of_seed:
                    uses = {field: self.found(name, seed) for field, name in self.used(stage).items()}
                    self.of_seed[stage.name, of] = self.step(stage, of, uses)
        return list(self.of_seed.values())

    @staticmethod
    def used(stage: Stage) -> dict[str, str]:
        """Earlier stages, by the field or the method that they are used for."""
        if isinstance(stage, Evaluate):
            return {method.name: method.stage for method in stage.read_methods() if method.stage is not None}
        return stage.used()

    def found(self, name: str, seed: int) -> Step:
        return self.of_seed[name, None if self.experiment.stage(name).seed == "fixed" else seed]

    def step(self, stage: Stage, seed: int | None, uses: Mapping[str, Step]) -> Step:
        used = {field: step.key for field, step in uses.items()}
        made_from = {"kind": stage.kind, "uses": used, **self.made_from(stage, FIXED_SEED if seed is None else seed)}
        if isinstance(stage, Trained | Subset) and "data" not in uses:
            made_from["data"] = sha256(self.plan.demonstration_lines if isinstance(stage, Sft) else self.plan.lines)
        key = sha256(json.dumps(made_from, sort_keys=True))
        home = "all-seeds" if seed is None else f"seed-{seed}"
        return Step(stage, seed, key, self.plan.root / home / f"{stage.name}-{key[:KEY]}", uses)

    def made_from(self, stage: Stage, seed: int) -> dict[str, Any]:
        """All but the data and the steps that it builds on."""
        experiment = self.experiment
        of = {"base": experiment.base, "objectives": experiment.objectives}
        match stage:
            case Subset():
                return {**stage.model_dump(include={"conflict_ratio", "size", "distinct_prompts"}), "seed": seed}
            case Sft():
                return {"base": experiment.base, "settings": _plain(experiment.settings(stage, seed))}
            case Aligned() | Modpo():
                settings = _plain(experiment.settings(stage, seed))
                return {**of, "settings": settings} | ({} if isinstance(stage, Align) else {"weights": experiment.points()})
            case Round():
                return {**of, "job": _plain(experiment.job(stage, seed)), "reward_models": stage.reward_models}
            case MoreTraining():
                return of  # all else is the round's
            case Evaluate():
                return {
                    **of,
                    **experiment.model_dump(include={"judges", "also", "standardise_on", "max_tokens"}),
                    **stage.model_dump(include={"methods", "against", "unseen", "kl"}),
                    "weights": experiment.points(),
                    "prompts": sha256(jsonl(self.plan.prompts)),
                }
            case _:
                raise AssertionError(stage.kind)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def jsonl(records: Sequence[Example] | Sequence[TestPrompt]) -> str:
    return "".join(f"{record.model_dump_json()}\n" for record in records)


def _plain(record: TrainSettings | JobSpec) -> dict[str, Any]:
    """Without defaults: a field that is added one day changes no key."""
    return record.model_dump(mode="json", exclude_defaults=True)
