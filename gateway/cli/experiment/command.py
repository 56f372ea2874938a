"""`sipo experiment …`: run the stages of a file one after the other, look at its plan, sum up its seeds (gateway.experiments)."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.cli.console import complaints, console
from gateway.cli.experiment.run import run_experiment
from gateway.cli.experiment.show import show_cost, show_plan
from gateway.cli.experiment.summary import show_summary
from gateway.cli.experiment.workplace import Workplace
from gateway.experiments.definition import ExperimentFile, find_experiment
from gateway.experiments.plan import Plan
from gateway.experiments.published import read_seeds, results_folder
from gateway.experiments.summary import Summary, write_summary
from gateway.settings import GatewaySettings
from services.common.settings import CommonSettings, load
from sipo.errors import NotFound

app = typer.Typer(no_args_is_help=True, help="Run experiments, stage by stage for several seeds, and look at their plans.")

Named = Annotated[str, typer.Argument(metavar="NAME|FILE.yaml", help="One of the folder experiments, or a file.")]


@app.command()
def run(
    experiment: Named,
    seed: Annotated[list[int] | None, typer.Option(help="Run this seed only; may be repeated. Default: all of the file.")] = None,
) -> None:
    """Run what is not finished of an experiment. The same command again goes on where it was stopped.

    Small results are left beside the file, in results/NAME, a folder for each seed and a summary of those that there are, wherever
    they ran. What is large stays in SIPO_DATA_DIR/experiments.

    Examples:

      sipo experiment run small-main

      sipo experiment run small-main --seed 1
    """
    settings = load(GatewaySettings, writes=True)
    file = find_experiment(experiment)
    seeds = file.experiment.chosen_seeds(seed)
    plan = _plan(file, settings)
    console.print(f"{plan.experiment.name}: {plan.experiment.description}", markup=False)
    try:
        summary = run_experiment(Workplace(plan, settings), seeds)
    except KeyboardInterrupt:
        complaints.print(f"stopped: the same command goes on with what is in {plan.root}", markup=False)
        raise
    _print_summary(plan, summary)


@app.command()
def summary(experiment: Named) -> None:
    """Make an experiment's summary again from the results of its seeds, such as those that other machines have added, and print it.

    Example:

      sipo experiment summary small-main
    """
    plan = _plan(find_experiment(experiment), load(CommonSettings))
    if not read_seeds(results_folder(plan)):
        raise NotFound(f"no seed has results in {results_folder(plan)}: sipo experiment run {experiment}", param="experiment")
    _print_summary(plan, write_summary(plan))


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


def _print_summary(plan: Plan, summary: Summary) -> None:
    show_summary(summary)
    console.print(f"\nresults: {results_folder(plan)}", markup=False)


def _plan(file: ExperimentFile, settings: CommonSettings) -> Plan:
    return Plan(file, settings.data_dir / "experiments")
