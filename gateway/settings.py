"""The gateway's settings, from SIPO_… variables."""

from __future__ import annotations

from pydantic import Field

from services.common.settings import JudgeSettings, Port, RewardModelSettings, TeacherSettings


class GatewaySettings(RewardModelSettings, TeacherSettings, JudgeSettings):
    gateway_port: Port = 8000
    decoder_url: str = Field(
        default="http://127.0.0.1:8001", description="where completions are made; several, separated by commas, share the work"
    )
