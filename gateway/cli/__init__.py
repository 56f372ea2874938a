"""The command line `sipo`: serve, try out, and work with data, jobs and policies. A module per idea; this one only lists them.

Commands on jobs and answers talk to a running gateway; those on data and policies work on this machine's files.
"""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.cli import jobs, policies, queue
from gateway.cli.conflicts import conflicts
from gateway.cli.console import CommandLine
from gateway.cli.demo.command import demo
from gateway.cli.evaluate.command import evaluate
from gateway.cli.experiment import command as experiment
from gateway.cli.generate import generate
from gateway.cli.score.command import score
from gateway.cli.train.command import train
from gateway.cli.train.reward import reward
from gateway.cli.train.sft import sft
from gateway.cli.up import up
from gateway.cli.version import show_version
from gateway.cli.weights import weights

app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Multi-objective language models: serve any preference weight, improve towards Pareto optimality.",
    epilog="Settings are environment variables: SIPO_DATA_DIR (~/.sipo), SIPO_MODEL (smollm2-135m), SIPO_REDIS_URL (embedded).",
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print what is installed, and in which version.")
    ] = False,
) -> None:
    pass


app.command()(up)
app.command()(demo)
app.command()(generate)
app.command()(conflicts)
app.command()(score)
app.command()(evaluate)
app.command()(sft)
app.command()(train)
app.command("train reward")(reward)
app.command()(weights)
app.add_typer(jobs.app, name="jobs")
app.add_typer(policies.app, name="policies")
app.add_typer(queue.app, name="queue")
app.add_typer(experiment.app, name="experiment")
