"""An experiment as its file has it: what it is made on, and its stages, each of which may build on stages before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from gateway.experiments.cost import Cost
from services.common.contract.jobs import JobSpec
from sipo.datasets import bundled_examples, bundled_on_policy_examples, read
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.comparing import MOST_REPORTS
from sipo.evaluation.plan import points_of
from sipo.evaluation.prompts import TestPrompt, read_prompts
from sipo.evaluation.report import SEED
from sipo.files import expanded
from sipo.models import BUNDLED_MODEL
from sipo.preferences import Example, ObjectiveName, Weights, check_objectives
from sipo.record import Record
from sipo.training.presets import NOT_OF_SFT, Preset, changed, read_preset
from sipo.training.settings import TrainSettings
from sipo.validation import explain

CHECKOUT = Path(__file__).parents[2]
SHIPPED = CHECKOUT / "experiments"
BUNDLED_DATA = {"bundled": bundled_examples, "bundled-on-policy": bundled_on_policy_examples}
BUNDLED_PROMPTS: Mapping[str, str] = {"bundled-test": "test_prompts.jsonl", "bundled-validation": "eval_prompts.jsonl"}
POLICY = "experiment"
"""What the policy sets of every stage are called: NAME:1 is the alignment's, and each round adds a version."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]


Uses = Mapping[str, tuple[str, ...]]
"""Kinds of stages, by the field that names one."""


class Stage(Record):
    """`USES`: the fields that name earlier stages, and of which kinds those may be."""

    USES: ClassVar[Uses] = {}

    name: Name
    kind: str
    seed: Literal["fixed"] | None = Field(default=None, description="fixed: once, not for every seed")

    def used(self) -> dict[str, str]:
        """Earlier stages by the field that names them."""
        return {field: stage for field in self.USES if (stage := getattr(self, field)) is not None}


class Trained(Stage):
    """`data`: the stage whose subset is trained on; None: the experiment's data, of a fine-tuning its demonstrations."""

    USES: ClassVar[Uses] = {"data": ("subset",)}
    data: Name | None = None


class Subset(Stage):
    """Training data with a chosen share of conflicting rows, equally large for all shares (section 2 of the paper)."""

    kind: Literal["subset"]
    conflict_ratio: float = Field(ge=0, le=1)
    size: int = Field(ge=1)
    distinct_prompts: bool = Field(default=False, description="no two rows of one prompt: a round asks each of its rows")


class Sft(Trained):
    """Supervised fine-tuning: the adapter that policies are aligned on top of, their reference."""

    kind: Literal["sft"]
    settings: TrainSettings = TrainSettings()


class Aligned(Trained):
    USES: ClassVar[Uses] = {"reference": ("sft",), **Trained.USES}
    reference: Name | None = Field(default=None, description="a fine-tuning; None: the base")
    settings: TrainSettings = TrainSettings()


class Align(Aligned):
    """A policy for each objective (Eq. 2)."""

    kind: Literal["align"]


class Lw(Aligned):
    """DPO LW: a model for each weight."""

    kind: Literal["lw"]


SETS = ("align", "round", "more_training")
"""Kinds that leave a policy set."""
MODELS = ("lw", "modpo")
"""Kinds that leave a model for each weight."""


class Modpo(Trained):
    """MODPO: a model for each weight, with the policies of `start` as margins."""

    USES: ClassVar[Uses] = {"start": SETS, **Trained.USES}
    kind: Literal["modpo"]
    start: Name
    settings: TrainSettings = TrainSettings()


class Round(Trained):
    """SIPO as the system runs it: a job from the policies of `start`."""

    USES: ClassVar[Uses] = {"start": SETS, **Trained.USES}
    NOT_ITS_OWN: ClassVar = frozenset(
        {"policy", "objectives", "seed", "sampling_set", "activate", "stop_after", "sft", "alignment"}
    )
    kind: Literal["round"]
    start: Name
    job: dict[str, Any] = Field(default={}, description="fields of a job; the preset gives its training")
    reward_models: dict[ObjectiveName, str] = Field(default={}, description="those that the job's filter names, by address")


class MoreTraining(Trained):
    """The control of a round: DPO goes on from the policies of `start` with the labels of the data, for as many steps."""

    USES: ClassVar[Uses] = {"start": SETS, "steps_of": ("round",), **Trained.USES}
    kind: Literal["more_training"]
    start: Name
    steps_of: Name = Field(description="the round whose steps, batch size and learning rates it has")


class Method(Record):
    """A method of an evaluation, whose source is a stage: of `base` there is none."""

    name: str
    kind: Literal["base", "reference", "mod", "soup", "models"]
    stage: str | None

    @classmethod
    def read(cls, text: str) -> Method:
        """Of `base`, or NAME=KIND:STAGE. Raises InvalidRequest."""
        name, equals, spec = text.partition("=")
        kind, _, stage = (spec if equals else name).partition(":")
        try:
            method = cls(name=name, kind=kind, stage=stage or None)
        except ValidationError:
            method = None
        if method is None or (method.kind == "base") != (method.stage is None):
            raise InvalidRequest(
                f"cannot read the method {text!r}: write base, or NAME=mod:STAGE, soup:STAGE, reference:STAGE or models:STAGE",
                param="methods",
            )
        return method


class Evaluate(Stage):
    """A report of each seed."""

    kind: Literal["evaluate"]
    seed: None = None
    methods: list[str] = Field(min_length=1, description="as `sipo evaluate` has them, with a stage's name for the set")
    against: list[str] = Field(default=[], description="methods with which all others are compared; default: each with all before")
    unseen: list[str] = Field(default=[], description="further weights, as `sipo evaluate` has them")
    kl: bool = Field(default=False, description="measure how far policies moved from their reference")

    def read_methods(self) -> list[Method]:
        return [Method.read(text) for text in self.methods]


KINDS: Mapping[str, type[Stage]] = {
    "subset": Subset,
    "sft": Sft,
    "align": Align,
    "lw": Lw,
    "modpo": Modpo,
    "round": Round,
    "more_training": MoreTraining,
    "evaluate": Evaluate,
}


class Experiment(Record):
    name: Name
    description: str
    preset: str = Field(default="small", description="training settings where stages have none: small, beavertails, helpsteer")
    base: str = BUNDLED_MODEL
    data: str = Field(
        default="bundled",
        description="bundled, bundled-on-policy, a file, or a hub name; a relative path begins at this file",
    )
    demonstrations: str | None = Field(
        default=None, description="data whose responses fine-tunings learn, named as `data` is; default: the same"
    )
    objectives: list[ObjectiveName] = Field(min_length=2)
    judges: dict[ObjectiveName, str] = Field(description="addresses by objective, in the order of `objectives`")
    also: dict[ObjectiveName, str] = Field(default={}, description="further judges, of what is no objective")
    prompts: str = Field(default="bundled-test", description="bundled-test, bundled-validation, a file or a hub name")
    max_prompts: int | None = Field(default=None, ge=2, description="the first of them; default: all")
    standardise_on: str | None = Field(default=None, description="prompts, as those, by the base's answers to which rewards count")
    weights: int | list[str] | None = Field(default=None, description="of evaluations, LW and MODPO, as `sipo evaluate` has them")
    max_tokens: int = Field(default=128, ge=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=MOST_REPORTS)
    stages: list[Stage] = Field(min_length=1)
    cost: Cost | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.judges) != self.objectives:
            raise ValueError("judges must name one address for each of the objectives, in their order")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        return self

    @property
    def defaults(self) -> Preset:
        return read_preset(self.preset)

    def chosen_seeds(self, chosen: Sequence[int] | None) -> list[int]:
        """In their order; None: all. Raises InvalidRequest for one that the experiment does not have."""
        if chosen and (unknown := set(chosen) - set(self.seeds)):
            raise InvalidRequest(
                f"{self.name} has no seed {min(unknown)}: its seeds are {', '.join(map(str, self.seeds))}", param="seed"
            )
        return [seed for seed in self.seeds if not chosen or seed in chosen]

    def points(self) -> list[Weights]:
        return points_of(self.objectives, self.weight_texts())

    def weight_texts(self) -> list[str]:
        """As `sipo evaluate` takes them."""
        if self.weights is None:
            return []
        return [str(self.weights)] if isinstance(self.weights, int) else self.weights

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def settings(self, stage: Sft | Aligned | Modpo, seed: int) -> TrainSettings:
        """Of a fine-tuning, an alignment, LW or MODPO: the preset's, over which the stage's win."""
        preset = self.defaults.sft if isinstance(stage, Sft) else self.defaults.alignment
        return changed(preset, stage.settings).model_copy(update={"seed": seed})

    def job(self, stage: Round, seed: int) -> JobSpec:
        """The job of a round, but for the set that it starts from. Raises ValidationError for fields that no job has."""
        preset, given = self.defaults, dict(stage.job)
        training = preset.sipo.model_dump(exclude_unset=True) | given.pop("training", {}) | {"seed": seed}
        rates = {} if "learning_rate" in stage.job.get("training", {}) else preset.sipo_learning_rates
        own = {"policy": POLICY, "objectives": self.objectives, "seed": seed, "training": training}
        return JobSpec.model_validate({"learning_rates": rates} | given | own)


class ExperimentFile(Record):
    """An experiment, and the file that it was read from."""

    path: Path
    experiment: Experiment

    def examples(self) -> list[Example]:
        """Those of the data with labels for the experiment's objectives, and those labels alone. Raises what reading data raises,
        and InvalidRequest for an objective without labels."""
        return self._labelled(self.experiment.data)

    def demonstrations(self) -> list[Example] | None:
        """As examples(); None if the data are the demonstrations as well."""
        named = self.experiment.demonstrations
        return None if named is None else self._labelled(named)

    def _labelled(self, data: str) -> list[Example]:
        objectives = self.experiment.objectives
        bundled = BUNDLED_DATA.get(data)
        examples = bundled("train", objectives) if bundled is not None else read(self._located(data)).labelled()
        labelled = [
            example.model_copy(update={"labels": labels})
            for example in examples
            if (labels := {name: example.labels[name] for name in objectives if name in example.labels})
        ]
        for name in objectives:
            if not any(name in example.labels for example in labelled):
                raise InvalidRequest(f"{self.path}: `objectives` has {name!r}, for which {data} has no label", param="objectives")
        return labelled

    def test_prompts(self) -> list[TestPrompt]:
        return read_prompts(self.prompts_source(self.experiment.prompts))[: self.experiment.max_prompts]

    def prompts_source(self, named: str) -> str:
        """A file, or a hub name."""
        if named in BUNDLED_PROMPTS:
            return str(CHECKOUT / "sipo" / "data" / "bundled" / BUNDLED_PROMPTS[named])
        return self._located(named)

    def _located(self, source: str) -> str:
        here = self.path.parent / expanded(source)
        return str(here) if here.exists() else source


def find_experiment(named: str, folder: Path = SHIPPED) -> ExperimentFile:
    """A file, or the name of one in `folder`. Raises NotFound, with the names that there are, and InvalidRequest."""
    path = expanded(named)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{named}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(one.stem for one in folder.glob("*.yaml"))) or "none"
            raise NotFound(f"no experiment {named!r}: there are {known}; or give a file, as ./mine.yaml", param="experiment")
    return read_experiment(path)


def read_experiment(path: Path) -> ExperimentFile:
    """Raises InvalidRequest that names file and field, NotFound if there is no such file."""
    if not path.is_file():
        raise NotFound(f"there is no file {path}", param="experiment")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is no YAML: {' '.join(str(error).split())}", param="experiment") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} holds no mapping of an experiment's fields", param="experiment")
    try:
        rows = content.get("stages")
        stages = [_stage(row) for row in rows] if isinstance(rows, list) else rows
        experiment = Experiment.model_validate({**content, "stages": stages})
        _check_stages(experiment)
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {explain(error, Experiment)[1]}", param="experiment") from error
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error.message}", param="experiment") from error
    return ExperimentFile(path=path.absolute(), experiment=experiment)


def _stage(row: object) -> Stage:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise InvalidRequest("a stage is a mapping with `name` and `kind`")
    kind = KINDS.get(str(row.get("kind")))
    if kind is None:
        raise InvalidRequest(f"stage {row['name']}: `kind` must be one of {', '.join(KINDS)}, not {row.get('kind')!r}")
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        raise InvalidRequest(f"stage {row['name']}: {explain(error, kind)[1]}") from error


def _check_stages(experiment: Experiment) -> None:
    """Raises InvalidRequest for stages that do not fit together, or settings that are not theirs."""
    check_objectives(experiment.objectives)
    experiment.points()
    read_preset(experiment.preset)
    earlier: dict[str, Stage] = {}
    for stage in experiment.stages:
        try:
            if stage.name in earlier:
                raise InvalidRequest("there are two stages of this name")
            for field, name in stage.used().items():
                _check_use(stage, field, earlier, name, stage.USES[field])
            _check_own(experiment, stage, earlier)
        except ValidationError as error:
            raise InvalidRequest(f"stage {stage.name}: {explain(error, JobSpec, at='job')[1]}") from error
        except InvalidRequest as error:
            raise InvalidRequest(f"stage {stage.name}: {error.message}") from error
        earlier[stage.name] = stage


def _check_use(stage: Stage, field: str, earlier: Mapping[str, Stage], name: str, kinds: Sequence[str]) -> None:
    fitting = [one.name for one in earlier.values() if one.kind in kinds]
    if name not in fitting:
        raise InvalidRequest(
            f"`{field}` is {name!r}: it must be an earlier stage of kind {' or '.join(kinds)}, of which there are "
            f"{', '.join(fitting) or 'none'}"
        )
    if stage.seed == "fixed" and earlier[name].seed != "fixed":
        raise InvalidRequest(f"`seed` is fixed, and {name} is made for every seed: leave it out, or fix that one as well")


def _check_own(experiment: Experiment, stage: Stage, earlier: Mapping[str, Stage]) -> None:
    if isinstance(stage, Sft | Aligned | Modpo):
        foreign = {"seed"} | (NOT_OF_SFT if isinstance(stage, Sft) else {"alpha"})
        _refuse(f"settings of kind {stage.kind}", stage.settings.model_fields_set & foreign)
    elif isinstance(stage, Round):
        _refuse("a round's job", stage.job.keys() & stage.NOT_ITS_OWN)
        by = experiment.job(stage, 0).filter.reward_models
        if unknown := [name for name in by if name not in stage.reward_models]:
            raise InvalidRequest(f"the filter names {unknown[0]!r}: give its address in `reward_models`")
        if same := [name for name in stage.reward_models if name in experiment.objectives]:
            raise InvalidRequest(f"the reward model {same[0]!r} is called like an objective: name it otherwise")
    elif isinstance(stage, Evaluate):
        methods = stage.read_methods()
        names = [method.name for method in methods]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequest(f"two methods are called {twice!r}: each needs a name of its own")
        if seeded := next(filter(SEED.fullmatch, names), None):
            raise InvalidRequest(f"the method {seeded!r} ends with a seed: leave it out, every seed has a report of its own")
        for method in methods:
            if method.stage is not None:
                _check_use(stage, method.name, earlier, method.stage, MODELS if method.kind == "models" else SETS)
        if unknown := [name for name in stage.against if name not in names]:
            raise InvalidRequest(f"`against` names {unknown[0]!r}: the methods are {', '.join(names)}")
        if "base" not in names and any(not address.startswith("python:") for address in experiment.judges.values()):
            raise InvalidRequest("rewards of judges that are no functions are counted from the base's: add the method base")


def _refuse(what: str, fields: Iterable[str]) -> None:
    if foreign := sorted(fields):
        raise InvalidRequest(f"{what} cannot have {', '.join(foreign)}: leave it out, the experiment gives it")
