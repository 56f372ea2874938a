"""`sipo queue …`: what lies in the queue of a running gateway, and another try for messages that died."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from gateway.cli.client import DEFAULT_URL, Gateway, GatewayUrl
from gateway.cli.console import console

app = typer.Typer(no_args_is_help=True, help="Look into the queue of a running gateway, and put dead messages back.")

OfJob = Annotated[str | None, typer.Option(help="Only the messages of this job.")]


@app.command()
def show(job: OfJob = None, url: GatewayUrl = DEFAULT_URL) -> None:
    """Print how many messages wait, are held and are dead, then each dead one: stream, entry, job/round/prompt, and why it died.

    Examples:

      sipo queue show

      sipo queue show --job job-0123456789ab
    """
    gateway = Gateway(url)
    dead = gateway.get("/v1/queue/dead" if job is None else f"/v1/queue/dead?job={quote(job)}")["data"]
    table = Table("stream", "waiting", "held", "dead", box=None, header_style="bold")
    for stream, depth in gateway.get("/v1/queue").items():
        table.add_row(stream, *(str(depth[place]) for place in ("waiting", "held", "dead")))
    console.print(table)
    for message in dead:  # lines, because a table would break the reasons
        prompt = "unreadable" if message["job"] is None else "{job}/{round}/{prompt}".format(**message)
        tries = "1 try" if message["tries"] == 1 else f"{message['tries']} tries"
        console.print(f"{message['stream']} {message['entry']} {prompt}, {tries}: {message['reason']}", markup=False)


@app.command()
def requeue(
    entries: Annotated[list[str] | None, typer.Argument(metavar="ENTRY", help="As `sipo queue show` prints them.")] = None,
    *,
    job: OfJob = None,
    stream: Annotated[str | None, typer.Option(help="prompts, candidates or decisions.")] = None,
    url: GatewayUrl = DEFAULT_URL,
) -> None:
    """Put dead messages back, untried: all, or those that match. Say why the others stay.

    Examples:

      sipo queue requeue

      sipo queue requeue --stream candidates --job job-0123456789ab

      sipo queue requeue 1759300000000-0
    """
    wanted: dict[str, Any] = {"entries": entries or None, "job": job, "stream": stream}
    reply = Gateway(url).post("/v1/queue/requeue", json=wanted)
    console.print(f"{reply['requeued']} went back, {reply['left']} stayed")
    for message in reply["stayed"]:
        console.print(f"{message['stream']} {message['entry']}: {message['why']}", markup=False)
