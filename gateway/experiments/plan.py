"""What an experiment comes to: each stage once for every seed, with a key of all that it is made from, and a folder of that key.

    <data_dir>/experiments/NAME/data-SHA.jsonl                   the training data
    <data_dir>/experiments/NAME/seed-1/STAGE-KEY/                a stage of one seed
    <data_dir>/experiments/NAME/all-seeds/STAGE-KEY/             a stage that is made once

Another setting makes another key, so a folder is of one content for ever, and what there is of others stays. Code is no part of a
key: what a change of the program spoils is for a person to remove.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
    Method,
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
    method's name, which ends with the seed where there are several: `sipo@1`."""

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
    """`root`: the experiment's folder. Raises what reading data and prompts raises, and InvalidRequest for prompts that are among
    the training data."""

    def __init__(self, file: ExperimentFile, root: Path, *, examples: Sequence[Example] | None = None) -> None:
        """`examples`: the data, where it is not to be read."""
        self.file = file
        self.root = root
        self.examples = list(file.examples() if examples is None else examples)
        self.steps = _Planning(self).all_steps()

    @property
    def experiment(self) -> Experiment:
        return self.file.experiment

    @cached_property
    def prompts(self) -> list[TestPrompt]:
        prompts = self.file.test_prompts()
        check_unseen(prompts, [example.prompt for example in self.examples], self.experiment.data)
        return prompts

    @cached_property
    def lines(self) -> str:
        return jsonl(self.examples)

    @property
    def data_file(self) -> Path:
        return self.root / f"data-{sha256(self.lines)[:KEY]}.jsonl"

    def write_data(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.data_file.exists():
            write_atomically(self.data_file, self.lines)


class _Planning:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.experiment = plan.experiment
        self.of_seed: dict[tuple[str, int | None], Step] = {}

    def all_steps(self) -> list[Step]:
        """In the order in which they run: seed by seed, so that the first seed tells how long all will take; evaluations last."""
        for seed in self.experiment.seeds:
            for stage in self.experiment.stages:
                of = None if stage.seed == "fixed" else seed
                if not isinstance(stage, Evaluate) and (stage.name, of) not in self.of_seed:
                    uses = {field: self.found(name, seed) for field, name in stage.used().items()}
                    self.of_seed[stage.name, of] = self.step(stage, of, uses)
        evaluations = [stage for stage in self.experiment.stages if isinstance(stage, Evaluate)]
        return [*self.of_seed.values(), *(self.step(stage, None, self.methods(stage)) for stage in evaluations)]

    def found(self, name: str, seed: int) -> Step:
        return self.of_seed[name, None if self.experiment.stage(name).seed == "fixed" else seed]

    def step(self, stage: Stage, seed: int | None, uses: Mapping[str, Step]) -> Step:
        used = {field: step.key for field, step in uses.items()}
        made_from = {"kind": stage.kind, "uses": used, **self.made_from(stage, FIXED_SEED if seed is None else seed)}
        if isinstance(stage, Trained | Subset) and "data" not in uses:
            made_from["data"] = sha256(self.plan.lines)
        key = sha256(json.dumps(made_from, sort_keys=True))
        home = "all-seeds" if seed is None else f"seed-{seed}"
        return Step(stage, seed, key, self.plan.root / home / f"{stage.name}-{key[:KEY]}", uses)

    def made_from(self, stage: Stage, seed: int) -> dict[str, Any]:
        """All but the data and the steps that it builds on."""
        experiment = self.experiment
        of = {"base": experiment.base, "objectives": experiment.objectives}
        match stage:
            case Subset():
                return {"conflict_ratio": stage.conflict_ratio, "size": stage.size, "seed": seed}
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

    def methods(self, stage: Evaluate) -> dict[str, Step]:
        steps: dict[str, Step] = {}
        for method in stage.read_methods():
            if method.stage is None:
                continue
            for seed in self.experiment.seeds:
                step = self.found(method.stage, seed)
                steps.setdefault(method.name if self.made_once(method, step) else f"{method.name}@{seed}", step)
        return steps

    @staticmethod
    def made_once(method: Method, step: Step) -> bool:
        """Of a reference, whether what the policies were aligned from is."""
        if method.kind != "reference":
            return step.seed is None
        while "start" in step.uses:
            step = step.uses["start"]
        return "reference" not in step.uses or step.uses["reference"].seed is None


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def jsonl(records: Sequence[Example] | Sequence[TestPrompt]) -> str:
    return "".join(f"{record.model_dump_json()}\n" for record in records)


def _plain(record: TrainSettings | JobSpec) -> dict[str, Any]:
    """Without defaults: a field that is added one day changes no key."""
    return record.model_dump(mode="json", exclude_defaults=True)
