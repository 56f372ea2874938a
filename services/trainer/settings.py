"""The trainer's settings, from SIPO_… variables."""

from __future__ import annotations

from services.common.settings import CommonSettings, Port


class TrainerSettings(CommonSettings):
    trainer_port: Port = 8004
