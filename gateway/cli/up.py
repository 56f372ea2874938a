"""`sipo up`: the whole system on this machine, until Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from gateway.cli.console import console
from gateway.settings import GatewaySettings
from gateway.shipped import publish_shipped
from services.common.local.stack import stack_specs
from services.common.local.supervisor import ProcessSpec, Supervisor
from services.common.settings import load
from sipo.models import BUNDLED_MODEL


def up(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the gateway. Default: SIPO_GATEWAY_PORT, or 8000.")] = None,
) -> None:
    """Start everything and serve until Ctrl-C: queue, decoder, reviewer, scorer, trainer, worker and gateway.

    Logs are in SIPO_DATA_DIR/logs, a file per process. A process that crashes is started again.

    Example:

      SIPO_MODEL=smollm2-135m sipo up --port 8080
    """
    settings = load(GatewaySettings, writes=True)
    port = port or settings.gateway_port
    if settings.model == BUNDLED_MODEL:
        publish_shipped(settings)
    specs = stack_specs(settings, gateway_port=port)
    tell = announce(specs, f"serving at http://{settings.host}:{port}/v1 (Ctrl-C stops); logs in {settings.data_dir / 'logs'}")
    Supervisor(specs, settings.data_dir, on_progress=tell).run()


def announce(specs: Sequence[ProcessSpec], all_ready: str) -> Callable[[str, str], None]:
    """Prints what happens to each process, and `all_ready` once all of them have been ready."""
    waiting = {spec.name for spec in specs}

    def tell(name: str, news: str) -> None:
        console.print(f"{name:<9} {news}", markup=False)
        if news.startswith("ready") and name in waiting:
            waiting.remove(name)
            if not waiting:
                console.print(all_ready, markup=False)

    return tell
