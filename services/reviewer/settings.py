"""The reviewer's settings, from SIPO_… variables."""

from __future__ import annotations

from pydantic import AliasChoices, Field

from services.common.settings import PREFIX, CommonSettings, Folder, Port


class ReviewerSettings(CommonSettings):
    reviewer_port: Port = 8002
    decoder_url: str = Field(
        default="http://127.0.0.1:8001",
        validation_alias=AliasChoices(f"{PREFIX}REVIEWER_DECODER_URL", f"{PREFIX}DECODER_URL", "decoder_url"),
        description="where reviews and rewrites are written, one or several as for the gateway; SIPO_REVIEWER_DECODER_URL if it is "
        "not the decoder of the answers",
    )
    reviewer_templates: Folder | None = Field(
        default=None, description="a folder of template files (*.yaml), used before the shipped ones of the same objectives"
    )
