"""`sipo train`: policies from a file, trained on this machine without any service, each run in a process of its own.

The folder of the runs is all that is remembered: the same command goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.console import complaints, console
from gateway.cli.data import SOURCES, SOURCES_HELP, read_sources, tell, tell_slots
from gateway.cli.train.options import Options, Settings, check_publishable, method_for, plan
from gateway.cli.train.progress import Display
from gateway.shipped import get_set
from services.common.local.training import launch_command, run_child
from services.common.settings import CommonSettings, load
from sipo.datasets.doubts import doubtful_labels
from sipo.errors import InvalidRequest
from sipo.files import expanded
from sipo.models import Base
from sipo.resources import check, needed_by_training
from sipo.training.planning import Planner
from sipo.training.presets import read_preset, read_settings
from sipo.training.run_set import RunSet, runs_sha256
from sipo.training.settings import ANSWER_TOKENS, Answered, Method, TrainMetrics, TrainSettings
from sipo.words import counted


def train(
    data: Annotated[list[str], typer.Argument(metavar=SOURCES, help=SOURCES_HELP)],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="The folder of the runs, one in it for each policy. Default: one of its own in SIPO_DATA_DIR/runs.",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="dpo: a policy per objective from its labels (Eq. 2). sipo: those of --start go on with pairs (Eq. 8). "
            "lw, modpo: one policy for --weights. Default: dpo for labelled data, sipo for pairs."
        ),
    ] = None,
    start: Annotated[str | None, typer.Option(help="NAME or NAME:VERSION: what sipo goes on from; the margins of modpo.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="The adapter that `sipo sft` left: dpo and lw train on top of it. Others: --start's."),
    ] = None,
    objectives: Annotated[str | None, typer.Option(help="Some of them, such as concise,warm. Default: all that there are.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of lw and modpo, such as concise=0.4,warm=0.6.")] = None,
    objective: Annotated[str | None, typer.Option(help="Of modpo: whose pairs. Default: the heaviest's.")] = None,
    preset: Annotated[str, typer.Option(help="small, or the paper's values: beavertails, helpsteer.")] = "small",
    settings: Annotated[
        Path | None, typer.Option(dir_okay=False, help="YAML with any training settings; they win over the preset.")
    ] = None,
    accelerate: Annotated[
        str | None, typer.Option(help="Several processes: a configuration of `accelerate launch`, or a shipped one's name.")
    ] = None,
    publish: Annotated[str | None, typer.Option(help="Policy name: the adapters of dpo or sipo become its next version.")] = None,
) -> None:
    """Train policies on a file. The same command again goes on where it was stopped.

    A run's folder has run.yaml and pairs.jsonl, which it is made from; at its end metrics.json, and adapter/ with a model card and
    the loss curve.

    Examples:

      sipo train helpful=a.jsonl harmless=b.jsonl --publish mine

      sipo train labelled.jsonl --reference runs/sft --publish mine

      sipo train labelled.jsonl --out runs/first --publish mine

      sipo train pairs.jsonl --out runs/second --start mine:1 --publish mine

      sipo train labelled.jsonl --out runs/lw --method lw --weights concise=0.4,warm=0.6
    """
    dataset = read_sources(data)
    options = Options(
        start=start, reference=reference, objectives=objectives, weights=weights, objective=objective, publish=publish
    )
    chosen = method_for(method, dataset, options)
    by_method = Settings(read_preset(preset), TrainSettings() if settings is None else read_settings(settings))
    command = launch_command(accelerate)
    common = load(CommonSettings)
    base = Base.open(common.model, common.cache_dir)
    beneath = None if reference is None else expanded(reference).absolute()
    planner = Planner(base, None if start is None else get_set(common, start), beneath)
    planned = plan(planner, chosen, dataset, options, by_method)
    if chosen != "sipo":
        learned = dict.fromkeys(name for one in planned for name in one.run.weights or [one.run.objective])
        tell(doubtful_labels(dataset.labelled(), list(learned)))
    for one in planned:
        tell(f"{one.name}: {sentence}" for sentence in one.account(planner.base.tokenizer))
    folder = common.data_dir / "runs" / f"{publish or chosen}-{runs_sha256(planned)[:8]}" if out is None else expanded(out)
    check(needed_by_training(planner.base.folder, planned[0].run.settings, len(planned)), folder)
    runs = RunSet(folder.absolute(), planned)
    if publish is not None:
        check_publishable(publish, runs.planned)
    try:
        runs.prepare()
    except InvalidRequest as error:
        raise InvalidRequest(f"{error.message} with --out", param="out") from error
    try:
        metrics = _train(runs, command)
    except KeyboardInterrupt:
        complaints.print(f"stopped: the same command goes on with what is in {runs.folder}", markup=False)
        raise
    _summarise(runs, metrics)
    if publish is not None:
        tell_slots(len(planned))
        published = runs.publish(publish, common.policies, planner.base, planner.start)
        console.print(f"published {published.id}; make it current with `sipo policies activate {published.id}`")


def _train(runs: RunSet, command: Sequence[str]) -> dict[str, TrainMetrics]:
    """By name; one run after the other."""
    metrics = {}
    with Display() as display:
        for planned in runs.planned:
            display.begin(planned.name, counted(len(planned.pairs), "pair"))
            folder = runs.run_folder(planned)
            if (finished := folder.finished()) is not None:
                metrics[planned.name] = finished
                display.end("was finished before")
                continue
            asyncio.run(run_child(folder.run_file, display.tell, command))
            trained = folder.finished()
            assert trained is not None
            metrics[planned.name] = trained
            display.end(f"finished after {trained.seconds:.0f} s")
    return metrics


def _summarise(runs: RunSet, metrics: Mapping[str, TrainMetrics]) -> None:
    columns = ("policy", "pairs", "validation", "loss before", "after", "accuracy before", "after", "seconds")
    table = Table(*columns, box=None, header_style="bold")
    for name, one in metrics.items():
        measured = (f"{value:.3f}" for value in (one.before.loss, one.after.loss, one.before.accuracy, one.after.accuracy))
        validation = one.validation_pairs if one.held_out else 0
        table.add_row(name, str(one.pairs), str(validation), *measured, f"{one.seconds:.0f}")
    console.print(table)
    for name, one in metrics.items():
        if one.answered is not None and one.answered_before is not None:
            console.print(f"{name}: {_answers(one.answered_before, one.answered)}", markup=False)
    if not all(one.held_out for one in metrics.values()):
        console.print("too few pairs to hold some out for validation: loss and reward accuracy are those of the training pairs")
    for planned in runs.planned:
        console.print(f"{planned.name}: {runs.run_folder(planned).path}", markup=False)


def _answers(before: Answered, after: Answered) -> str:
    return (
        f"greedy answers to {counted(after.prompts, 'prompt')}, at most {ANSWER_TOKENS} tokens, have {after.tokens:.0f} (before "
        f"{before.tokens:.0f}); {after.empty} are empty ({before.empty}), {after.endless} had not ended ({before.endless})"
    )
