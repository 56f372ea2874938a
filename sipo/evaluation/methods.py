"""The methods of an evaluation, opened from how a caller names them: which adapters, over which base, answer at which weights.

    base                  the base model alone                 base:FOLDER              another base
    mod:SET               the set's policies mixed             soup:SET                 the set's policies merged
    reference:SET         what they were aligned from, alone   models:FILE.yaml         a model of its own for each weight

SET is NAME or NAME:VERSION of the store, or a folder with an adapter for each objective in it, such as `sipo train` leaves.
@FOLDER behind it names the base of adapters that belong to another one. The reference of a folder's adapters is what their runs
were trained on top of; without runs it is the adapter in FOLDER/_reference, or the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from sipo.conversation import Prompt, as_prompt
from sipo.errors import IncompatiblePolicy, InvalidRequest, NotFound
from sipo.evaluation.report import Kind
from sipo.files import expanded
from sipo.models import Base, model_sha256
from sipo.policies import POLICY_NAME, REFERENCE, SET_VERSION, PolicySet, adapter_sha256
from sipo.preferences import Weights, format_weights, normalize_weights
from sipo.prompts import PromptFormat
from sipo.record import Record
from sipo.training.run_folder import ADAPTER, RunFolder, reference_of
from sipo.validation import explain

METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""It names a file, too."""
FORMS = "base[:FOLDER], reference:SET, mod:SET, soup:SET or models:FILE.yaml, and @FOLDER behind it if its base is not SIPO_MODEL"


@dataclass(frozen=True)
class Adapter:
    folder: Path
    sha256: str
    rank: int

    @classmethod
    def open(cls, folder: Path, base: Base) -> Adapter:
        """Raises IncompatiblePolicy for what cannot be mixed over this base."""
        from sipo.lora import check_base, load_adapter  # torch takes seconds to import

        adapter = load_adapter(folder)
        check_base(adapter, base.folder)
        return cls(folder, adapter_sha256(folder), max(a.shape[0] for a, _ in adapter.modules.values()))


@dataclass(frozen=True)
class Method:
    """`points`: the weights at which it answers, or None alone for base and reference. `adapters` are by objective; of `models` by
    the weights (format_weights) that each is for. `reference`: the adapter below all of them, None for the base itself. `trained`:
    the prompts that adapters were trained on, by folder, where these tell."""

    name: str
    kind: Kind
    source: str
    base: Base
    prompt_format: PromptFormat
    points: Sequence[Weights | None]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    reference: Adapter | None = None
    trained: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """How many models one answer needs at a time."""
        return len(self.adapters) if self.kind == "mod" else 1

    def identity(self) -> dict[str, object]:
        """All that its answers depend on, wherever the files lie."""
        identity: dict[str, object] = {
            "name": self.name,
            "kind": self.kind,
            "base": self.base.ref.sha256,
            "prompt_format": self.prompt_format.model_dump(mode="json"),
            "points": list(self.points),
            "adapters": {name: adapter.sha256 for name, adapter in self.adapters.items()},
        }
        if self.reference is not None:  # else left out: evaluations begun before there were references go on
            identity["reference"] = self.reference.sha256
        return identity


class WeightedModel(Record):
    """An entry of a file of models: a PEFT adapter, trained for these weights. A path that is relative begins at the file."""

    weights: Weights
    adapter: Path


@dataclass(frozen=True)
class _Found:
    """PEFT folders, by objective or by weights, and the reference below them, if it is not the base."""

    folders: Mapping[str, Path]
    reference: Adapter | None
    prompt_format: PromptFormat


@dataclass(frozen=True)
class Methods:
    """Opens methods. `get_set` finds a policy set by NAME or NAME:VERSION, `weights` are those of every method but the base."""

    model: str
    cache_dir: Path
    get_set: Callable[[str], PolicySet]
    objectives: Sequence[str]
    weights: Sequence[Weights]
    _bases: dict[str, Base] = field(default_factory=dict)

    def open(self, text: str) -> Method:
        """NAME=KIND:SOURCE, or `base` alone. Raises InvalidRequest, NotFound and IncompatiblePolicy."""
        name, equals, spec = text.partition("=")
        kind, _, source = (spec if equals else name).partition(":")
        if not METHOD_NAME.fullmatch(name) or kind not in KINDS:
            raise InvalidRequest(
                f"cannot read the method {text!r}: write NAME={FORMS}; a name is letters, digits, ., _ and -", param="methods"
            )
        try:
            return KINDS[kind](self, name, source)
        except (InvalidRequest, NotFound) as error:
            raise type(error)(f"the method {name}: {error.message}", param=error.param) from error

    def _base(self, name: str, source: str) -> Method:
        base = self._opened(source) if source else self._default
        return Method(name, "base", base.ref.name, base, base.prompt_format, [None])

    def _mod(self, name: str, source: str) -> Method:
        return self._of_set(name, "mod", source)

    def _soup(self, name: str, source: str) -> Method:
        return self._of_set(name, "soup", source)

    def _reference(self, name: str, source: str) -> Method:
        return replace(self._of_set(name, "reference", source), points=[None], adapters={}, trained={})

    def _of_set(self, name: str, kind: Kind, source: str) -> Method:
        named, base = self._with_base(source)
        found = self._published(named, base) if _names_set(named) else self._in_folder(expanded(named), base)
        return self._method(name, kind, named, base, found, points=self.weights)

    def _method(self, name: str, kind: Kind, source: str, base: Base, found: _Found, *, points: Sequence[Weights]) -> Method:
        adapters = {key: Adapter.open(folder, base) for key, folder in found.folders.items()}
        trained = _trained(found.folders.values())
        return Method(name, kind, source, base, found.prompt_format, points, adapters, found.reference, trained)

    def _published(self, named: str, base: Base) -> _Found:
        chosen = self.get_set(named)
        if sorted(chosen.objectives) != sorted(self.objectives):
            raise InvalidRequest(
                f"{chosen.id} has policies for {', '.join(chosen.objectives)}, and there are judges of "
                f"{', '.join(self.objectives)}: give one for each of its objectives",
                param="judges",
            )
        known = chosen.manifest.base
        if known.sha256 != base.ref.sha256:
            raise IncompatiblePolicy(
                f"{chosen.id} was trained on {known.name} ({known.sha256[:12]}), not on {base.ref.name} ({base.ref.sha256[:12]}): "
                f"`sipo evaluate` takes {named}@FOLDER, with the folder of its base",
                param="methods",
            )
        chosen.verify()
        prompt_format = chosen.manifest.prompt_format
        prompt_format.check(base.tokenizer)
        folders = {objective: chosen.adapter_dir(objective) for objective in self.objectives}
        reference = chosen.reference_dir
        return _Found(folders, None if reference is None else Adapter.open(reference, base), prompt_format)

    def _in_folder(self, folder: Path, base: Base) -> _Found:
        found = self._trained_adapters({objective: _adapter_in(folder / objective) for objective in self.objectives}, base)
        if (folder / REFERENCE).is_dir() and not _runs(found.folders.values()):
            return replace(found, reference=Adapter.open(_adapter_in(folder / REFERENCE), base))
        return found

    def _models(self, name: str, source: str) -> Method:
        text, base = self._with_base(source)
        file = expanded(text)
        models = _read_models(file)
        weights = [normalize_weights(model.weights, self.objectives, param="methods") for model in models]
        folders = {
            format_weights(one): _adapter_in(file.parent / expanded(model.adapter))
            for one, model in zip(weights, models, strict=True)
        }
        if len(folders) != len(self.weights) or len(folders) != len(models):
            raise InvalidRequest(
                f"{file} has models for {len(folders)} different weights, the other methods answer at {len(self.weights)}: fronts "
                "compare at as many weights each",
                param="weights",
            )
        return self._method(name, "models", text, base, self._trained_adapters(folders, base), points=weights)

    def _trained_adapters(self, folders: Mapping[str, Path], base: Base) -> _Found:
        """The reference and the prompt format are those of the runs that trained the adapters, where there are such; else the base
        and its natural one. Raises IncompatiblePolicy where a run's base is another one: of the same shape, its adapters would
        answer, and wrongly. Raises as reference_of does."""
        runs = [run.run() for run in _runs(folders.values())]
        for run in runs:
            if run.base.is_dir() and model_sha256(run.base, self.cache_dir) != base.ref.sha256:
                raise IncompatiblePolicy(
                    f"its adapters were trained on {run.base}, not on {base.ref.name}: write @{run.base} behind it", param="methods"
                )
        formats = list(dict.fromkeys(run.prompt_format for run in runs)) or [base.prompt_format]
        if len(formats) > 1:
            raise IncompatiblePolicy(
                "its adapters were trained with different prompt formats: train them with one", param="methods"
            )
        formats[0].check(base.tokenizer)
        reference = reference_of(*runs) if runs else None
        return _Found(folders, None if reference is None else Adapter.open(reference, base), formats[0])

    def _with_base(self, source: str) -> tuple[str, Base]:
        """What stands before the last @, and the base that stands behind it."""
        if not source:
            raise InvalidRequest(f"it names no source: write {FORMS}", param="methods")
        before, at, folder = source.rpartition("@")
        if not at or expanded(source).exists():
            return source, self._default
        return before, self._opened(folder)

    @property
    def _default(self) -> Base:
        return self._opened(self.model)

    def _opened(self, name: str) -> Base:
        """The same base is the same object, whose tokenizer is loaded once."""
        if name not in self._bases:
            self._bases[name] = Base.open(name, self.cache_dir)
        return self._bases[name]


KINDS: Mapping[str, Callable[[Methods, str, str], Method]] = {
    "base": Methods._base,
    "reference": Methods._reference,
    "mod": Methods._mod,
    "soup": Methods._soup,
    "models": Methods._models,
}


def _names_set(reference: str) -> bool:
    """What can name a set does: a folder of such a name is ./NAME."""
    name, colon, version = reference.partition(":")
    return bool(POLICY_NAME.fullmatch(name)) and (not colon or bool(SET_VERSION.fullmatch(version)))


def _adapter_in(folder: Path) -> Path:
    """A PEFT adapter, or a training run's folder that has one."""
    found = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    if not found.is_dir():
        raise NotFound(f"there is no folder {folder}: it must hold the adapter", param="methods")
    return found


def _runs(adapters: Iterable[Path]) -> list[RunFolder]:
    """Those training runs whose adapters they are, as far as the folders tell."""
    runs = [RunFolder(folder.parent) for folder in adapters if folder.name == ADAPTER]
    return [run for run in runs if run.run_file.is_file() and run.pairs_file.is_file()]


def _trained(adapters: Iterable[Path]) -> dict[str, list[Prompt]]:
    return {str(run.path): [as_prompt(pair["prompt"]) for pair in run.pairs()] for run in _runs(adapters)}


def _read_models(file: Path) -> list[WeightedModel]:
    """Raises InvalidRequest, NotFound."""
    example = "a list of entries such as {weights: {concise: 0.2, warm: 0.8}, adapter: runs/lw-2/adapter}"
    if not file.is_file():
        raise NotFound(f"there is no file {file}: it must be YAML, {example}", param="methods")
    try:
        return TypeAdapter(list[WeightedModel]).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise InvalidRequest(f"{file}: {explain(error)[1]}: write {example}", param="methods") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is no YAML ({' '.join(str(error).split())}): write {example}", param="methods") from error
