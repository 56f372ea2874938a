"""What every process reads from the environment, and how a bad value stops it.

Each service extends CommonSettings in its own settings.py, and its main.py reads it once, with `load`. Variables are the field
names in capitals after SIPO_: `data_dir` is SIPO_DATA_DIR. Variables that a service does not know belong to its neighbours.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from sipo.policies import PolicyStore
from sipo.preferences import ObjectiveName
from sipo.validation import requirement

PREFIX = "SIPO_"
KEPT_IN = ("data_dir", "cache_dir")
"""The fields that name the folders in which the system keeps its files."""


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no home folder") from None
    except OSError as error:
        raise ValueError(f"the folder that it is relative to is gone: {error.strerror}") from None


Folder = Annotated[Path, AfterValidator(_absolute)]
Port = Annotated[int, Field(ge=1, le=65535, description="the port to listen on")]


def _fits_a_header(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
        raise ValueError("a key is printable ASCII without spaces")
    return key


class Teacher(BaseModel):
    """An OpenAI-compatible endpoint whose answers may be candidates beside the policies' own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: HttpUrl = Field(description="as OpenAI's clients know it: what comes before /chat/completions")
    model: str = Field(min_length=1)
    api_key: Annotated[SecretStr, AfterValidator(_fits_a_header)] | None = None


class CommonSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", validate_default=True, env_ignore_empty=True)

    data_dir: Folder = Field(default=Path("~/.sipo"), description="policies, jobs, logs, and the embedded queue's files")
    cache_dir: Folder = Field(default=Path("~/.cache/sipo"), description="what can be made again: models, hashes")
    host: str = Field(default="127.0.0.1", description="the address to listen on; 0.0.0.0 for all")
    redis_url: str = Field(
        default="redis://127.0.0.1:6390", pattern=r"^(rediss?|unix)://", description="Redis 7 or Valkey 8, or newer"
    )
    model: str = Field(default="smollm2-135m", min_length=1, description="base model: bundled name, folder or hub name")
    decoder_sleeps: bool = Field(
        default=False, description="the decoder gives its GPU's memory up while policies are trained, and answers nothing meanwhile"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least serious lines that a process writes to its log"
    )

    @property
    def policies(self) -> PolicyStore:
        return PolicyStore(self.data_dir / "policies")

    @property
    def evaluations_dir(self) -> Path:
        """A folder per evaluation: see sipo.evaluation.task."""
        return self.data_dir / "evaluations"

    @property
    def jobs_dir(self) -> Path:
        """A folder per job: see services.common.contract.job_files."""
        return self.data_dir / "jobs"


class RewardModelSettings(CommonSettings):
    """Of those that choose among external reward models or ask them."""

    reward_models: dict[ObjectiveName, str] = Field(
        default={},
        description="external reward models that a job's filter may name, as JSON: "
        '{"safety": "hf:FOLDER_OR_HUB_NAME", "quality": "http://HOST/score", "brevity": "python:ENTRY_POINT"}',
    )


class JudgeSettings(CommonSettings):
    """Of those that choose among the judges of evaluations or ask them."""

    evaluation_judges: dict[ObjectiveName, str] = Field(
        default={},
        description="judges that evaluations over HTTP may name, beside python: functions, as JSON: "
        '{"harmless": "hf:FOLDER_OR_HUB_NAME", "helpful": "http://HOST/score"}',
    )


class TeacherSettings(CommonSettings):
    """Of those that choose among teachers or ask them: their keys are nobody else's business."""

    teachers: dict[ObjectiveName, Teacher] = Field(
        default={},
        description="endpoints that a job may ask for candidates as well, as JSON: "
        '{"big": {"url": "https://HOST/v1", "model": "NAME", "api_key": "KEY"}}',
    )


S = TypeVar("S", bound=CommonSettings)


def load(settings: type[S], *, writes: bool = False) -> S:
    """The settings from the environment; a bad value ends the process with status 2 and one sentence naming the variable.

    The folders in which the system keeps its files must be there, or such that they can be made. `writes`: the process cannot do
    without a data folder that it may write in, so it is made, and tried, at once.
    """
    try:
        loaded = settings()
    except SettingsError as error:  # a variable that should be JSON; pydantic-settings names its field
        field = str(error).split('"')[1]
        _stop(f"{PREFIX}{field.upper()} is not usable: it must be JSON.")
    except ValidationError as error:
        first = error.errors()[0]
        field, *inside = map(str, first["loc"])
        if field in KEPT_IN and first["type"] == "value_error":
            _stop(_no_place(field, first["input"], requirement(first)))
        variable = PREFIX + field.upper()
        # Only what is a whole variable is shown: inside JSON there may be keys.
        given = f"={first['input']!r}" if first["input"] == os.environ.get(variable) else ""
        where = "".join(f"{part}: " for part in inside)
        _stop(f"{variable}{given} is not usable: {where}{requirement(first)}.")
    for field in KEPT_IN:
        folder: Path = getattr(loaded, field)
        if reason := _why_unusable(folder):
            _stop(_no_place(field, folder, reason))
    if writes and (reason := _why_unwritable(loaded.data_dir)):
        _stop(_no_place("data_dir", loaded.data_dir, reason))
    return loaded


def _stop(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def _no_place(field: str, folder: object, reason: str) -> str:
    return f"{PREFIX}{field.upper()}={folder} cannot be used ({reason}): set it to a folder that may be written"


def _why_unusable(folder: Path) -> str | None:
    """None for a folder that can be read (a reader needs no more) or made."""
    try:
        if folder.is_dir():
            return None if os.access(folder, os.R_OK | os.X_OK) else "it may not be read"
        if os.path.lexists(folder):
            return "it is no folder"
        above = next(parent for parent in folder.parents if os.path.lexists(parent))
        if not above.is_dir():
            return f"{above} is no folder"
        return None if os.access(above, os.W_OK | os.X_OK) else f"it is not there, and {above} may not be written"
    except OSError as error:
        return error.strerror


def _why_unwritable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror
