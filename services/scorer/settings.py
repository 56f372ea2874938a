"""The scorer's settings, from SIPO_… variables."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from services.common.settings import Port, RewardModelSettings


class ScorerSettings(RewardModelSettings):
    scorer_port: Port = 8003
    scorer_device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    scorer_threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, description="CPU threads; default: all cores")
    scorer_tokens: int | None = Field(
        default=None, ge=16, description="tokens in a pass, all models together; default: 1024 on a CPU, 16384 on a GPU"
    )
    scorer_tf32: bool = Field(
        default=False, description="on a GPU: faster products of 10-bit mantissas; `make bench-score` prints how many orders flip"
    )
    scorer_gpu_memory: float = Field(default=1, gt=0, le=1, description="part of the GPU's memory that the scorer may take")
    scorer_messages: int = Field(default=8, ge=1, description="messages held at a time; they share passes")
    scorer_resident_sets: int = Field(default=2, ge=1, description="policy sets kept in memory")
