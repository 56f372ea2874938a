"""A whole service process: start, log lines, orderly end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import httpx

from services.common.local.processes import free_ports
from support import PATIENCE

SERVICE = """
import asyncio, logging, sys
from contextlib import asynccontextmanager
import structlog
from services.common import logging as logs
from services.common.web.app import create_app, serve
from services.common.settings import CommonSettings, load

settings = load(CommonSettings)
logs.configure("slow", settings.log_level)

@asynccontextmanager
async def lifespan(app):
    yield
    structlog.get_logger("slow").info("put away", tools=2)

app = create_app("slow", settings, lifespan)

@app.get("/slow")
async def slow():
    logging.getLogger("library").warning("working for %s", "a while")
    await asyncio.sleep(0.5)
    return "done"

serve(app, settings.host, int(sys.argv[1]))
"""


async def test_a_service_finishes_its_requests_on_sigterm_and_logs_json_lines() -> None:
    (port,) = free_ports(1)
    service = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVICE, str(port), stderr=asyncio.subprocess.PIPE)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http, asyncio.timeout(PATIENCE):
        while True:
            try:
                assert (await http.get("/ready")).status_code == 200
                break
            except httpx.TransportError:
                await asyncio.sleep(0.05)
        request = asyncio.create_task(http.get("/slow", headers={"x-request-id": "r-1"}))
        await asyncio.sleep(0.2)
        service.send_signal(signal.SIGTERM)
        assert (await request).json() == "done"
        _, output = await service.communicate()
    lines = [json.loads(line) for line in output.decode().splitlines()]
    assert all(line["service"] == "slow" and {"event", "level", "logger", "timestamp"} <= line.keys() for line in lines)
    by_event = {line["event"]: line for line in lines}
    assert by_event["working for a while"]["request_id"] == "r-1"
    assert by_event["put away"]["tools"] == 2
    told = by_event["request"]
    assert (told["path"], told["status"], told["request_id"]) == ("/slow", 200, "r-1")
    assert [line["path"] for line in lines if line["event"] == "request"] == ["/slow"], "probes are not told"
