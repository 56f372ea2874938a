"""The steps that train: each run is one of sipo.training, in a process of its own, and goes on where it was stopped."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from gateway.cli.experiment.workplace import Made, Workplace, fine_tuned, policy_set, reference_of, store, subset_file, take_over
from gateway.cli.train.progress import Display
from gateway.experiments.definition import POLICY, Align, Lw, Modpo, MoreTraining, Sft, Subset
from gateway.experiments.plan import Step, jsonl
from gateway.experiments.published import DATA, JOB_REPORT, RUNS
from gateway.experiments.result import Tokens
from services.common.contract.job_files import JobFiles
from services.common.contract.reports import Report
from services.common.local.training import run_child
from sipo.datasets import answers_of, subset
from sipo.errors import TrainingFailed
from sipo.files import write_atomically
from sipo.preferences import Weights
from sipo.resources import check, needed_by_sft, needed_by_training
from sipo.training.data import VALIDATION_SHARE, alignment_pairs, tokenise
from sipo.training.planning import PlannedRun, Planner, fine_tuning
from sipo.training.run_folder import RunFolder
from sipo.training.run_set import RunSet
from sipo.words import counted

MODELS_FILE = "models.yaml"


def cut(at: Workplace, step: Step, stage: Subset) -> Made:
    chosen = subset(at.plan.examples, stage.conflict_ratio, stage.size, step.training_seed, distinct_prompts=stage.distinct_prompts)
    write_atomically(subset_file(step), jsonl(chosen))
    return Made(Tokens(), {})


def fine_tune(at: Workplace, step: Step, stage: Sft) -> Made:
    base, settings = at.base, at.plan.experiment.settings(stage, step.training_seed)
    check(needed_by_sft(base.folder, settings), step.folder)
    run = fine_tuning(base, settings)
    answered = [answers_of(example) for example in at.examples(step)]
    folder = fine_tuned(step)
    if (metrics := folder.finished()) is None:
        folder.prepare(run, answered)
        with Display() as display:
            display.begin(stage.name, counted(len(answered), "row"))
            asyncio.run(run_child(folder.run_file, display.tell, at.command))
        metrics = folder.finished()
    assert metrics is not None

    from sipo.training.sft import sft_rows  # with torch, which takes seconds to import

    rows = sft_rows(answered, run.prompt_format, base.tokenizer, settings)
    read = sum(len(row["input_ids"]) for row in rows.train)
    return Made(Tokens(trained=round(read * settings.epochs)), {"training": metrics.seconds})


def align(at: Workplace, step: Step, stage: Align) -> Made:
    planner = Planner(at.base, reference=reference_of(step))
    settings, examples = at.plan.experiment.settings(stage, step.training_seed), at.examples(step)
    planned = [planner.dpo(objective, examples, settings) for objective in at.plan.experiment.objectives]
    runs = _trained(at, step.folder / RUNS, planned)
    published = runs.publish(POLICY, store(step), at.base, None)
    return _made(at, [runs], published.id)


def lw(at: Workplace, step: Step, stage: Lw) -> Made:
    planner = Planner(at.base, reference=reference_of(step))
    settings, examples = at.plan.experiment.settings(stage, step.training_seed), at.examples(step)
    planned = [(weights, planner.lw(weights, examples, settings)) for weights in at.plan.experiment.points()]
    return _models(at, step, planned)


def modpo(at: Workplace, step: Step, stage: Modpo) -> Made:
    """At each weight on the pairs of its heaviest objective, with the other policies as margins."""
    planner = Planner(at.base, policy_set(step.uses["start"]))
    settings, examples = at.plan.experiment.settings(stage, step.training_seed), at.examples(step)
    planned = [
        (weights, planner.modpo(max(weights, key=weights.__getitem__), weights, examples, settings))
        for weights in at.plan.experiment.points()
    ]
    return _models(at, step, planned)


def more_training(at: Workplace, step: Step, stage: MoreTraining) -> Made:
    """From the policies of `start`, themselves frozen as reference, on the labels of the data, without the NLL term of Eq. 8."""
    start, examples = policy_set(step.uses["start"]), at.examples(step)
    planner = Planner(at.base, start)
    planned, steps = [], {}
    for objective in start.objectives:
        pairs = list(alignment_pairs(examples, objective))
        trained = round_runs(step.uses["steps_of"], objective)
        steps[objective] = sum(metrics.steps for one in trained if (metrics := one.finished()) is not None)
        settings = trained[0].run().settings.model_copy(update={"alpha": 0.0})
        # No more pairs than those steps take, with a share held out: the reference's pass is over all of them.
        taken = math.ceil((steps[objective] + 1) * settings.batch_size / (1 - VALIDATION_SHARE))
        settings = settings.model_copy(update={"max_pairs": taken})
        rows = len(_train_rows(at, planner.sipo(objective, pairs, settings)))
        per_epoch = math.ceil(rows / settings.batch_size)
        settings = settings.model_copy(update={"epochs": epochs_of(steps[objective], per_epoch)})
        planned.append(planner.sipo(objective, pairs, settings))
    runs = _trained(at, step.folder / RUNS, planned)
    for one in planned:
        metrics = runs.run_folder(one).finished()
        if metrics is None or metrics.steps != steps[one.name]:
            raise TrainingFailed(
                f"{one.name} was to have {steps[one.name]} steps, as the round had, and came to {metrics and metrics.steps}"
            )
    take_over(start, store(step))
    return _made(at, [runs], runs.publish(POLICY, store(step), at.base, start).id)


def round_runs(step: Step, objective: str) -> list[RunFolder]:
    """The trainings of the job that finished a round step, one of each of the job's rounds."""
    report = Report.model_validate_json((step.folder / JOB_REPORT).read_bytes())
    files = JobFiles(step.folder / DATA / "jobs" / report.job)
    return [RunFolder(files.training_run(one.round, objective)) for one in report.rounds if one.policy_set is not None]


def epochs_of(steps: int, per_epoch: int) -> float:
    """So many that a trainer, which rounds up, makes just `steps` of them."""
    epochs = steps / per_epoch
    return epochs if math.ceil(epochs * per_epoch) == steps else math.nextafter(epochs, 0)


def trained_tokens(at: Workplace, folder: RunFolder) -> int:
    run = folder.run()
    rows = _train_rows(at, PlannedRun("", run, folder.pairs()))
    return round(run.settings.epochs * sum(len(row) for row in rows))


def _train_rows(at: Workplace, planned: PlannedRun) -> list[list[int]]:
    """Of each pair that is trained on, prompt and both responses in tokens."""
    settings = planned.run.settings
    tokens = tokenise(
        planned.pairs,
        planned.run.prompt_format,
        at.base.tokenizer,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_response_tokens=settings.max_response_tokens,
        max_pairs=settings.max_pairs,
        seed=settings.seed,
    )
    return [row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"] for row in tokens.train]


def _models(at: Workplace, step: Step, planned: Sequence[tuple[Weights, PlannedRun]]) -> Made:
    """A run in a folder of its own for each weight, and the list of them that an evaluation reads."""
    runs = [_trained(at, step.folder / RUNS / str(number), [one]) for number, (_, one) in enumerate(planned)]
    listed = [
        {"weights": dict(weights), "adapter": str(one.run_folder(run).path.relative_to(step.folder))}
        for one, (weights, run) in zip(runs, planned, strict=True)
    ]
    (step.folder / MODELS_FILE).write_text(yaml.safe_dump(listed))
    return _made(at, runs, None)


def _trained(at: Workplace, folder: Path, planned: Sequence[PlannedRun]) -> RunSet:
    """Those that are finished stay; what is left of the others is gone on with."""
    check(needed_by_training(at.base.folder, planned[0].run.settings, len(planned)), folder.parent)
    runs = RunSet(folder, planned)
    runs.prepare()
    with Display() as display:
        for one in planned:
            run = runs.run_folder(one)
            if run.finished() is None:
                display.begin(f"{one.name} ({one.run.method})", counted(len(one.pairs), "pair"))
                asyncio.run(run_child(run.run_file, display.tell, at.command))
                display.end("finished")
    return runs


def _made(at: Workplace, sets: Iterable[RunSet], published: str | None) -> Made:
    folders = {f"{runs.folder.name}/{one.name}": runs.run_folder(one) for runs in sets for one in runs.planned}
    seconds = {name: metrics.seconds for name, run in folders.items() if (metrics := run.finished()) is not None}
    return Made(Tokens(trained=sum(trained_tokens(at, run) for run in folders.values())), seconds, published)
