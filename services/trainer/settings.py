"""The trainer's settings, from SIPO_… variables."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from services.common.local.training import launch_command
from services.common.settings import JudgeSettings, Port, RewardModelSettings
from sipo.errors import InvalidRequest


def _can_be_launched(accelerate: str | None) -> str | None:
    try:
        launch_command(accelerate)
    except InvalidRequest as error:
        raise ValueError(error.message) from error
    return accelerate


class TrainerSettings(JudgeSettings, RewardModelSettings):
    trainer_port: Port = 8004
    decoder_url: str = Field(
        default="http://127.0.0.1:8001", description="with decoder_sleeps: which decoder sleeps; several are separated by commas"
    )
    trainer_gpu_memory: float = Field(default=1, gt=0, le=1, description="part of a GPU's memory that a training process may take")
    trainer_accelerate: Annotated[str | None, AfterValidator(_can_be_launched)] = Field(
        default=None,
        description="an accelerate configuration for several processes: a file, or multi_gpu, fsdp2, zero3, two_nodes",
    )
