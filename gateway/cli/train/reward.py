"""`sipo train reward`: a reward model of one objective from its pairs, to judge policies with (sipo.training.reward_models)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.console import complaints, console
from gateway.cli.data import SOURCES, SOURCES_HELP, read_sources, tell
from gateway.cli.train.progress import Display
from services.common.settings import CommonSettings, load
from sipo.datasets import Dataset, Pair
from sipo.errors import InvalidRequest
from sipo.files import expanded
from sipo.models import Base
from sipo.preferences import check_objectives
from sipo.resources import check, needed_by_sft
from sipo.training.data import TrainingPair, alignment_pairs
from sipo.training.presets import changed, read_preset, read_settings
from sipo.training.process import take_one_gpu
from sipo.training.settings import TrainSettings
from sipo.words import counted


def reward(
    data: Annotated[list[str], typer.Argument(metavar=SOURCES, help=SOURCES_HELP)],
    *,
    objective: Annotated[str | None, typer.Option(help="Whose pairs. Default: the only one that the data has.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="A folder that is not there yet. Default: one of its own in SIPO_DATA_DIR/reward-models."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model that becomes one. Default: SIPO_MODEL.")] = None,
    preset: Annotated[
        str, typer.Option(help="small, or the paper's values of a first alignment: beavertails, helpsteer.")
    ] = "small",
    settings: Annotated[
        Path | None, typer.Option(dir_okay=False, help="YAML with training settings; they win over the preset.")
    ] = None,
) -> None:
    """Train a reward model of one objective. The same command again goes on where it was stopped.

    It judges policies in an evaluation: give it pairs that they were not trained on. A file that is called reward is ./reward for
    `sipo train`.

    Examples:

      sipo train reward labelled.jsonl --objective helpful

      sipo train reward helpful=pairs.jsonl --out judges/helpful
    """
    name, pairs = _pairs(read_sources(data), objective)
    given = TrainSettings() if settings is None else read_settings(settings)
    chosen = changed(read_preset(preset).alignment, given)
    common = load(CommonSettings)
    model = Base.open(base or common.model, common.cache_dir)
    needs = replace(needed_by_sft(model.folder, chosen, merged=True), what=f"a reward model on {model.ref.name}")
    check(needs, common.data_dir if out is None else expanded(out))

    take_one_gpu()
    from transformers.utils import logging

    from sipo.training.reward_models import NOT_OF_REWARDS, RewardRun, train_reward_model

    if foreign := sorted(given.model_fields_set & NOT_OF_REWARDS):
        raise InvalidRequest(
            f"{settings} sets {', '.join(foreign)}: a reward model has no reference, leave it out", param="settings"
        )
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would warn that the base has no head yet
    run = RewardRun(name, model, pairs, chosen)
    tell(run.account())
    folder = common.data_dir / "reward-models" / run.name if out is None else expanded(out)
    with Display() as display:
        display.begin(name, counted(len(pairs), "pair"))
        try:
            made = train_reward_model(
                run, folder.absolute(), lambda progress: asyncio.run(display.tell(progress)), cache_dir=common.cache_dir
            )
        except KeyboardInterrupt:
            complaints.print("stopped: the same command goes on", markup=False)
            raise
        display.end("finished")
    measured = counted(made.held_out, "pair") + " held out" if made.held_out else "the training pairs, too few to hold some out"
    console.print(
        f"{name}: accuracy {made.after.accuracy:.3f} on {measured}; before {made.before.accuracy:.3f}, and of who always prefers "
        f"the longer response {made.longer_preferred:.3f}"
    )
    console.print(f"the reward model is {folder.absolute()}: name it as hf:{folder.absolute()}", markup=False)


def _pairs(dataset: Dataset, objective: str | None) -> tuple[str, list[TrainingPair]]:
    """The objective and its pairs. Pairs that name none are those of the one that was asked for."""
    if objective is not None:
        check_objectives([objective], param="objective")
        rows = [
            row.model_copy(update={"objective": objective}) if isinstance(row, Pair) and row.objective is None else row
            for row in dataset.rows
        ]
        dataset = replace(dataset, rows=rows)  # type: ignore[arg-type]  # of one kind, as they were
    examples = dataset.labelled()
    known = list(dict.fromkeys(name for example in examples for name in example.labels))
    if objective is None and len(known) > 1:
        raise InvalidRequest(f"a reward model is of one objective: name it, as --objective {known[0]}, of {', '.join(known)}")
    if objective not in (None, *known):
        raise InvalidRequest(f"unknown objective {objective!r}: the data has labels for {', '.join(known)}", param="objective")
    name = objective or known[0]
    return name, list(alignment_pairs(examples, name))
