"""The trainer's settings, from SIPO_… variables."""

from __future__ import annotations

from pydantic import Field

from services.common.settings import CommonSettings, Port


class TrainerSettings(CommonSettings):
    trainer_port: Port = 8004
    trainer_accelerate: str | None = Field(
        default=None,
        description="an accelerate configuration for several processes: a file, or multi_gpu, fsdp2, zero3, two_nodes",
    )
