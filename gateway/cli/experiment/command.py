"""`sipo experiment …`: run the stages of a file one after the other, and look at its plan (gateway.experiments)."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.cli.console import complaints, console
from gateway.cli.experiment.run import run_experiment
from gateway.cli.experiment.show import show_cost, show_plan
from gateway.cli.experiment.workplace import Workplace
from gateway.experiments.definition import ExperimentFile, find_experiment
from gateway.experiments.plan import Plan
from gateway.settings import GatewaySettings
from services.common.settings import CommonSettings, load

app = typer.Typer(no_args_is_help=True, help="Run experiments, stage by stage for several seeds, and look at their plans.")

Named = Annotated[str, typer.Argument(metavar="NAME|FILE.yaml", help="One of the folder experiments, or a file.")]


@app.command()
def run(experiment: Named) -> None:
    """Run what is not finished of an experiment. The same command again goes on where it was stopped.

    Small results are left beside the file, in results/NAME. What is large stays in SIPO_DATA_DIR/experiments/NAME.

    Example:

      sipo experiment run small-main
    """
    settings = load(GatewaySettings, writes=True)
    plan = _plan(find_experiment(experiment), settings)
    console.print(f"{plan.experiment.name}: {plan.experiment.description}", markup=False)
    try:
        run_experiment(Workplace(plan, settings))
    except KeyboardInterrupt:
        complaints.print(f"stopped: the same command goes on with what is in {plan.root}", markup=False)
        raise


@app.command()
def show(experiment: Named) -> None:
    """Print an experiment's plan: what is done, how long the rest will take by what is, and what it costs at full size.

    Example:

      sipo experiment show small-main
    """
    file = find_experiment(experiment)
    console.print(f"{file.experiment.name}: {file.experiment.description}\n", markup=False)
    if file.experiment.cost is not None:
        show_cost(file.experiment.cost)
    show_plan(_plan(file, load(CommonSettings)))


def _plan(file: ExperimentFile, settings: CommonSettings) -> Plan:
    return Plan(file, settings.data_dir / "experiments" / file.experiment.name)
