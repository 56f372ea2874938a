"""What every process reads from the environment, and how a bad value stops it.

Each service extends CommonSettings in its own settings.py, and its main.py reads it once, with `load`. Variables are the field
names in capitals after SIPO_: `data_dir` is SIPO_DATA_DIR. Variables that a service does not know belong to its neighbours.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from sipo.policies import PolicyStore
from sipo.preferences import ObjectiveName

PREFIX = "SIPO_"

Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
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


class TeacherSettings(CommonSettings):
    """Of those that choose among teachers or ask them: their keys are nobody else's business."""

    teachers: dict[ObjectiveName, Teacher] = Field(
        default={},
        description="endpoints that a job may ask for candidates as well, as JSON: "
        '{"big": {"url": "https://HOST/v1", "model": "NAME", "api_key": "KEY"}}',
    )


S = TypeVar("S", bound=CommonSettings)


def load(settings: type[S]) -> S:
    """The settings from the environment; a bad value ends the process with status 2 and one sentence naming the variable."""
    try:
        return settings()
    except SettingsError as error:  # a variable that should be JSON; pydantic-settings names its field
        field = str(error).split('"')[1]
        print(f"{PREFIX}{field.upper()} is not usable: it must be JSON.", file=sys.stderr)
        raise SystemExit(2) from None
    except ValidationError as error:
        first = error.errors()[0]
        field, *inside = map(str, first["loc"])
        variable = PREFIX + field.upper()
        # Only what is a whole variable is shown: inside JSON there may be keys.
        given = f"={first['input']!r}" if first["input"] == os.environ.get(variable) else ""
        where = "".join(f"{part}: " for part in inside)
        print(f"{variable}{given} is not usable: {where}{first['msg']}.", file=sys.stderr)
        raise SystemExit(2) from None
