"""Starts the reviewer with the real decoder."""

from __future__ import annotations

from services.common import logging
from services.common.settings import load
from services.common.web.app import serve
from services.common.web.clients import DecoderClient
from services.reviewer.app import create_app
from services.reviewer.settings import ReviewerSettings


def main() -> None:
    settings = load(ReviewerSettings)
    logging.configure("reviewer", settings.log_level)
    serve(create_app(settings, DecoderClient(settings.decoder_url)), settings.host, settings.reviewer_port)
