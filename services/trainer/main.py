"""Starts the trainer with the real queue server, decoders and training processes."""

from __future__ import annotations

from services.common import logging
from services.common.queue import connect
from services.common.settings import load
from services.common.web.app import serve
from services.trainer.app import create_app, open_stages
from services.trainer.decoders import decoder_clients
from services.trainer.settings import TrainerSettings


def main() -> None:
    settings = load(TrainerSettings, writes=True)
    logging.configure("trainer", settings.log_level)
    decoders = decoder_clients(settings.decoder_url) if settings.decoder_sleeps else []
    serve(create_app(settings, connect(settings.redis_url), open_stages, decoders), settings.host, settings.trainer_port)
