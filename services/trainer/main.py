"""Starts the trainer with the real queue server."""

from __future__ import annotations

from services.common import logging
from services.common.queue import connect
from services.common.settings import load
from services.common.web.app import serve
from services.trainer.app import create_app
from services.trainer.settings import TrainerSettings


def main() -> None:
    settings = load(TrainerSettings)
    logging.configure("trainer", settings.log_level)
    serve(create_app(settings, connect(settings.redis_url)), settings.host, settings.trainer_port)
