"""What our own records have in common, in files, in messages and in requests."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Does not change, and has no fields but its own: an unknown one is a mistake, not a wish."""

    model_config = ConfigDict(frozen=True, extra="forbid")
