"""The scorer's settings, from SIPO_… variables."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from services.common.settings import CommonSettings, Port


class ScorerSettings(CommonSettings):
    scorer_port: Port = 8003
    scorer_device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    scorer_threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, description="CPU threads; default: all cores")
    scorer_batch: int = Field(default=4, ge=1, description="messages held at a time; each is decided and handed on by itself")
    scorer_resident_sets: int = Field(default=2, ge=1, description="policy sets kept in memory")
