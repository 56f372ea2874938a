"""The generation worker's settings, from SIPO_… variables."""

from __future__ import annotations

from pydantic import Field

from services.common.settings import Port, TeacherSettings


class WorkerSettings(TeacherSettings):
    worker_port: Port = 8005
    decoder_url: str = Field(
        default="http://127.0.0.1:8001", description="where responses are sampled; several, separated by commas, share the work"
    )
    reviewer_url: str = Field(default="http://127.0.0.1:8002", description="where they are reviewed and rewritten")
    worker_prompts: int = Field(default=4, ge=1, description="prompts in work at a time; the weights of a prompt go at once anyway")
