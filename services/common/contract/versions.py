"""The version of what outlives the release that wrote it: jobs, reports and dead messages.

Messages have their version too, and a queue's way with one that cannot be read (services.common.contract.messages).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, model_validator

from sipo.errors import Conflict

SCHEMA_VERSION: Final = 1


class Versioned(BaseModel):
    """Raises Conflict where a record of another version is read, which is what a release meets that was put back in the place of a
    later one. Records of before there was a version are of version 1."""

    NAMED_BY: ClassVar[str]
    """The field that says which record it is."""

    version: Literal[1] = SCHEMA_VERSION

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping):
            cls.refuse_another_version(fields)
        return fields

    @classmethod
    def refuse_another_version(cls, fields: Mapping[str, Any]) -> None:
        if (version := fields.get("version", SCHEMA_VERSION)) != SCHEMA_VERSION:
            which = f"{cls.__name__} {fields.get(cls.NAMED_BY)}"
            raise Conflict(
                f"{which} was written by another release: its version is {version}, this one reads version {SCHEMA_VERSION}"
            )
