"""Starts the gateway with the real decoder and the real queue server."""

from __future__ import annotations

import httpx

from gateway.app import create_app
from gateway.settings import GatewaySettings
from services.common import logging
from services.common.queue import connect
from services.common.settings import load
from services.common.web.app import serve
from services.common.web.replicas import replica_client


def main() -> None:
    settings = load(GatewaySettings, writes=True)
    logging.configure("gateway", settings.log_level)
    # A long answer says nothing until it is done, and how many callers there are is not ours to limit: the decoder queues.
    timeout = httpx.Timeout(None, connect=5)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    decoder = replica_client(settings.decoder_url, timeout=timeout, limits=limits)
    serve(create_app(settings, decoder, connect(settings.redis_url)), settings.host, settings.gateway_port)
