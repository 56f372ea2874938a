"""`sipo sft`: supervised fine-tuning of the base on all responses of a file, into a new base (sipo.training.sft)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.console import complaints, console
from gateway.cli.train_data import Labelled, read_data
from gateway.cli.train_progress import Display
from services.common.settings import CommonSettings, load
from sipo.errors import InvalidRequest
from sipo.models import resolve_model
from sipo.prompts import PromptFormat
from sipo.training.presets import read_settings
from sipo.training.settings import TrainSettings


def sft(
    data: Annotated[str, typer.Argument(metavar="FILE", help="Labelled data, as for `sipo conflicts`; the labels do not matter.")],
    *,
    out: Annotated[Path, typer.Option(file_okay=False, help="The new base: a folder that is not there yet.")],
    settings: Annotated[
        Path | None, typer.Option(dir_okay=False, help="YAML with training settings. Default: 3 epochs at 1e-4, as the paper's.")
    ] = None,
) -> None:
    """Fine-tune the base model (SIPO_MODEL) on every response of a file. The same command again goes on where it was stopped.

    The new base has a hash of its own: policies are aligned on it anew.

    Example:

      sipo sft labelled.jsonl --out models/tuned

      SIPO_MODEL=models/tuned sipo up
    """
    file = read_data(data)
    if not isinstance(file, Labelled):
        raise InvalidRequest("fine-tuning takes labelled data, and the file holds pairs")
    # The paper's values; the rest is as for policies.
    chosen = TrainSettings(epochs=3, learning_rate=1e-4, batch_size=2) if settings is None else read_settings(settings)
    common = load(CommonSettings)
    base = resolve_model(common.model, common.cache_dir)

    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from sipo.training.sft import SftRun, train_sft

    disable_progress_bar()
    run = SftRun(base, common.model, PromptFormat.of(AutoTokenizer.from_pretrained(base)), chosen)
    with Display() as display:
        display.begin("sft", len(file.examples))
        try:
            made = train_sft(
                run,
                file.examples,
                out.expanduser().absolute(),
                lambda progress: asyncio.run(display.tell(progress)),
                cache_dir=common.cache_dir,
            )
        except KeyboardInterrupt:
            complaints.print("stopped: the same command goes on", markup=False)
            raise
        display.end("finished")
    console.print(f"the new base is {made}: start with SIPO_MODEL={made}", markup=False)
