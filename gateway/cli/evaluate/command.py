"""`sipo evaluate`: how far fronts reach, by judges, on prompts that nothing was trained on (sipo.evaluation); without any service.

The folder is all that is remembered: the same command goes on where it was stopped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.console import complaints, console
from gateway.cli.evaluate.job import read_job
from gateway.cli.evaluate.progress import Display
from gateway.cli.evaluate.results import show_report
from gateway.shipped import get_set
from services.common.settings import RewardModelSettings, load
from sipo.datasets import conflict_report, read
from sipo.evaluation.methods import FORMS, Methods
from sipo.evaluation.plan import Plan, open_methods, points_of, read_addresses, read_judges, unseen_of
from sipo.evaluation.prompts import TestPrompt, check_unseen, read_prompts, unique
from sipo.evaluation.run import evaluate as run_evaluation
from sipo.evaluation.summary import Context, filtered
from sipo.files import expanded

PROMPTS = "FILE..."


def evaluate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar=PROMPTS,
            help="A text file with a prompt a line, rows that have a `prompt`, or any data; labelled pairs tell whose answers beat "
            "both responses. Rows that `split` holds out of training are taken, too.",
        ),
    ],
    *,
    method: Annotated[
        list[str],
        typer.Option(
            help=f"NAME=KIND:SOURCE, once a method: {FORMS}. SET: NAME[:VERSION], or a folder of adapters. NAME@SEED=… for each of "
            "several trainings of a method."
        ),
    ],
    judge: Annotated[
        list[str],
        typer.Option(
            help="OBJECTIVE=ADDRESS, once an objective: python:NAME, hf:FOLDER_OR_HUB_NAME(#LABEL) or http(s)://HOST/score."
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="The folder of answers, rewards and report.")],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="How many, evenly spread, or each, as concise=0.3,warm=0.7. Default: 6; of more objectives, the vertices, "
            "the uniform weights and the midpoints."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 128,
    max_prompts: Annotated[int | None, typer.Option(min=2, help="The first of them. Default: all.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="A method, without seed, with which all others are compared. Default: each with all before it."),
    ] = None,
    unseen: Annotated[
        list[str] | None,
        typer.Option(help="Further weights at which mod and soup answer, and which count for no front: how many, or each."),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="NAME=ADDRESS: a further judge, of what is no objective (side effects).")
    ] = None,
    standardise_on: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts by the base's answers to which rewards are standardised. Default: the tests'."),
    ] = None,
    kl: Annotated[
        bool, typer.Option("--kl", help="Measure how far policies moved from their reference, on the first 32 prompts.")
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option(help="Labelled training data, whose conflicts are shown. Once a file or hub name.")
    ] = None,
    job: Annotated[
        list[Path] | None, typer.Option(metavar="REPORT", help="A job's report.json, or its folder: what its policies come from.")
    ] = None,
    not_in: Annotated[
        list[str] | None, typer.Option(help="Training data: prompts that are in it are refused. Once a file or hub name.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap. Answers are greedy.")] = 0,
) -> None:
    """Measure fronts: every method answers the prompts at each weight, judges reward the answers, and a report compares them.

    Prints means and hypervolumes with their intervals; index.html and report.json in the folder have everything. The same command
    again goes on where it was stopped.

    Examples:

      sipo evaluate prompts.jsonl --method base --method mod=mod:demo --method soup=soup:demo \\
        --judge concise=python:concise --judge warm=python:warm --out runs/first-front

      sipo evaluate prompts.txt --method tuned=base:models/tuned --method sipo=soup:runs/second@models/tuned \\
        --method modpo=models:modpo.yaml@models/tuned --judge helpful=hf:HELPFUL --judge harmless=hf:HARMLESS --out runs/front

      sipo evaluate prompts.txt --method base --method mod@1=mod:runs/first-1 --method mod@2=mod:runs/first-2 \\
        --method sipo@1=mod:runs/second-1 --method sipo@2=mod:runs/second-2 --against mod --unseen 5 \\
        --judge concise=python:concise --judge warm=python:warm --also simple=python:simple --out runs/seeds
    """
    asked = _read(prompts, max_prompts)
    for source in not_in or []:
        check_unseen(asked, [one.prompt for one in read_prompts(source, held_out=False)], source)
    judges = read_judges(judge)
    objectives = list(judges)
    common = load(RewardModelSettings)
    points = points_of(objectives, weights or [])
    further = unseen_of(objectives, unseen, points) if unseen else []
    methods = Methods(common.model, common.cache_dir, partial(get_set, common), objectives, points)
    folder = expanded(out).absolute()
    plan = Plan(
        folder.name,
        asked,
        open_methods(methods, method, further),
        judges,
        max_tokens,
        also=read_addresses(also or [], "also"),
        validation=read_prompts(standardise_on) if standardise_on else (),
        unseen=further,
    )
    context = Context(
        data={source: conflict_report(read(source).labelled()) for source in data or []},
        jobs=[read_job(expanded(path), common.reward_models) for path in job or []],
    )
    for name, model in filtered(plan, context.jobs).items():
        complaints.print(f"warning: the judge of {name} filtered the training pairs, as {model}", markup=False)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # between our own lines its log would tell nobody anything
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    try:
        with Display() as display:
            report = run_evaluation(plan, folder, display.tell, against=against or [], seed=seed, divergence=kl, context=context)
    except KeyboardInterrupt:
        complaints.print(f"stopped: the same command goes on with what is in {folder}", markup=False)
        raise
    show_report(report)
    console.print(f"the report is {folder / 'index.html'}", markup=False)


def _read(sources: Sequence[str], most: int | None) -> list[TestPrompt]:
    return unique(prompt for source in sources for prompt in read_prompts(source))[:most]
