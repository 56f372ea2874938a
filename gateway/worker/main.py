"""Starts the generation worker with the real services and the real queue server."""

from __future__ import annotations

from gateway.worker.app import create_app
from gateway.worker.settings import WorkerSettings
from services.common import logging
from services.common.queue import connect
from services.common.settings import load
from services.common.web.app import serve
from services.common.web.clients import DecoderClient, ReviewerClient


def main() -> None:
    settings = load(WorkerSettings)
    logging.configure("worker", settings.log_level)
    decoder, reviewer = DecoderClient(settings.decoder_url), ReviewerClient(settings.reviewer_url)
    serve(create_app(settings, connect(settings.redis_url), decoder, reviewer), settings.host, settings.worker_port)
