"""Starts the scorer with the real model and the real queue server."""

from __future__ import annotations

from services.common import logging
from services.common.queue import connect
from services.common.settings import load
from services.common.web.app import serve
from services.scorer.app import create_app
from services.scorer.settings import ScorerSettings


def main() -> None:
    settings = load(ScorerSettings)
    logging.configure("scorer", settings.log_level)
    serve(create_app(settings, connect(settings.redis_url)), settings.host, settings.scorer_port)
