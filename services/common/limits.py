"""What a decoder can mix and read: its settings, which importers of policies look at too, and its own answer to who asks it."""

from __future__ import annotations

from pydantic import Field

from services.common.settings import CommonSettings
from sipo.record import Record

MAX_SLOTS = 8


class MixingSettings(CommonSettings):
    """Of those that serve policies, and those that tell beforehand whether they can be served."""

    decoder_slots: int = Field(default=2, ge=1, le=MAX_SLOTS, description="rows per token: how many policies one request can mix")
    decoder_max_model_len: int = Field(
        default=4096, ge=16, description="prompt and response together, in tokens; unset, no more than the model's own context"
    )


class Limits(Record):
    """A decoder's reply to GET /v1/limits."""

    slots: int
    max_model_len: int


def slots_for(needed: int, slots: int) -> str:
    """How `needed` models can be mixed where a decoder has fewer `slots`, as the end of a sentence."""
    if needed > MAX_SLOTS:
        return f"no decoder has more than {MAX_SLOTS} slots: take mode soup"
    return f"that needs a decoder with SIPO_DECODER_SLOTS={needed} (it is {slots}): start it so, or take mode soup"
