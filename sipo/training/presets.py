"""Settings from YAML: presets that ship with the package, and a caller's own file. To add a preset, put a file into presets/."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from sipo.errors import InvalidRequest
from sipo.preferences import ObjectiveName
from sipo.record import Record
from sipo.training.settings import TrainSettings
from sipo.validation import explain

PRESETS = Path(__file__).parent / "presets"
NOT_OF_SFT = frozenset({"beta", "alpha", "divergence", "divergence_alpha", "max_pairs"})
"""Settings of preference pairs: supervised fine-tuning has none."""

M = TypeVar("M", bound=BaseModel)


class Preset(Record):
    """Settings for one data set, by stage."""

    sft: TrainSettings = Field(description="of supervised fine-tuning: see NOT_OF_SFT")
    alignment: TrainSettings = Field(description="of a first alignment, and of DPO LW and MODPO")
    sipo: TrainSettings
    sipo_learning_rates: dict[ObjectiveName, float] = Field(default={}, description="of objectives that have their own")

    def sipo_for(self, objective: str) -> TrainSettings:
        own = self.sipo_learning_rates.get(objective, self.sipo.learning_rate)
        return self.sipo.model_copy(update={"learning_rate": own})


def read_preset(name: str) -> Preset:
    """Raises InvalidRequest, with the names that there are, for an unknown one."""
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in names:
        raise InvalidRequest(f"no preset {name!r}: there are {', '.join(names)}", param="preset")
    return _read(PRESETS / f"{name}.yaml", Preset)


def read_settings(path: Path) -> TrainSettings:
    """Any fields of TrainSettings: those that the file has are `model_fields_set`. Raises InvalidRequest, naming the field."""
    return _read(path, TrainSettings)


def changed(settings: TrainSettings, by: TrainSettings) -> TrainSettings:
    """`settings` with the fields that were set in `by`."""
    return settings.model_copy(update=by.model_dump(exclude_unset=True))


def _read(path: Path, model: type[M]) -> M:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", param="settings") from error
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{path} is no YAML: {' '.join(str(error).split())}", param="settings") from error
    try:
        return model.model_validate({} if content is None else content)
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {explain(error, model)[1]}", param="settings") from error
