"""`sipo sft`: supervised fine-tuning of the base on all responses of a file (sipo.training.sft)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.console import complaints, console
from gateway.cli.data import SOURCES, SOURCES_HELP, read_sources, tell
from gateway.cli.train.progress import Display
from services.common.settings import CommonSettings, load
from sipo.errors import InvalidRequest
from sipo.files import expanded
from sipo.models import Base
from sipo.resources import check, needed_by_sft
from sipo.training.planning import fine_tuning
from sipo.training.presets import NOT_OF_SFT, changed, read_preset, read_settings
from sipo.training.process import take_one_gpu
from sipo.training.settings import TrainSettings
from sipo.words import counted


def sft(
    data: Annotated[list[str], typer.Argument(metavar=SOURCES, help=SOURCES_HELP)],
    *,
    out: Annotated[Path, typer.Option(file_okay=False, help="For what is made: a folder that is not there yet.")],
    preset: Annotated[str, typer.Option(help="small, or the paper's values: beavertails, helpsteer.")] = "small",
    settings: Annotated[
        Path | None, typer.Option(dir_okay=False, help="YAML with training settings; they win over the preset.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Leave a whole model, which is a base of its own.")] = False,
) -> None:
    """Fine-tune the base model (SIPO_MODEL) on every response of the data. The same command again goes on where it was stopped.

    Labels do not matter. What is left is an adapter to align policies on top of. With --merge it is a new base with a hash of its
    own: policies are aligned on it anew.

    Examples:

      sipo sft labelled.jsonl --out runs/sft

      sipo train labelled.jsonl --reference runs/sft --publish mine

      sipo sft labelled.jsonl --out models/tuned --merge

      SIPO_MODEL=models/tuned sipo up
    """
    answered = read_sources(data).answers()
    given = TrainSettings() if settings is None else read_settings(settings)
    if foreign := sorted(given.model_fields_set & NOT_OF_SFT):
        raise InvalidRequest(f"{settings} sets {', '.join(foreign)}: fine-tuning has no pairs, leave it out", param="settings")
    chosen = changed(read_preset(preset).sft, given)
    common = load(CommonSettings)
    base = Base.open(common.model, common.cache_dir)
    check(needed_by_sft(base.folder, chosen, merged=merge), expanded(out))

    take_one_gpu()
    from transformers.utils.logging import disable_progress_bar

    from sipo.training.sft import account, train_sft

    disable_progress_bar()
    run = fine_tuning(base, chosen)
    tell(account(answered, base.prompt_format, base.tokenizer, chosen))
    with Display() as display:
        display.begin("sft", counted(len(answered), "row"))
        try:
            made = train_sft(
                run,
                answered,
                expanded(out).absolute(),
                lambda progress: asyncio.run(display.tell(progress)),
                merged=merge,
            )
        except KeyboardInterrupt:
            complaints.print("stopped: the same command goes on", markup=False)
            raise
        display.end("finished")
    use = f"the new base is {made}: start with SIPO_MODEL={made}" if merge else f"align policies on it: --reference {made}"
    console.print(use, markup=False)
