"""The states of records, whatever else they may be: each kind of record ends in one of three."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Kinds of records add their members, `completed`, `failed` and `cancelled` among them."""

    @property
    def ended(self) -> bool:
        return self in ("completed", "failed", "cancelled")
