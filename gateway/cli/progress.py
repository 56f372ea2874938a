"""A job's progress, live on a terminal and as lines elsewhere (a log, a pipe)."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from gateway.cli.console import console
from services.common.contract.job_store import Job
from services.common.contract.jobs import JobState
from sipo.evaluation.task import EvaluationProgress
from sipo.training.settings import Progress as Training
from sipo.words import counted, share

LINE_SECONDS = 15.0
"""Off a terminal, at most one line in this time for one stage."""


def watch_job(fetch: Callable[[], Job], *, every: float = 1.0) -> Job:
    """Shows the job until it has ended; returns it as it ended."""
    show = _show_live if console.is_interactive else _show_lines
    return show(fetch, every)


def detail(job: Job) -> str:
    """The round, if there are several, and the numbers of the job's present stage in words."""
    in_round = job.spec.rounds > 1 and not job.state.ended and job.state not in (JobState.QUEUED, JobState.ALIGNING)
    round_ = f"round {job.round} of {job.spec.rounds}" if in_round else ""
    return ": ".join(filter(None, (round_, _numbers(job))))


def _numbers(job: Job) -> str:
    if (training := _training(job)) is not None:
        if training.stage == "reference":
            done = f"reference has scored {training.step} of {counted(training.of, 'pair')}"
        else:
            done = f"step {training.step} of {training.of}, loss {training.loss:.4f}"
        note = f" ({training.note})" if training.note else ""
        return f"{training.objective}: {done}, {training.seconds_left:.0f} s left{note}"
    if (evaluating := _evaluating(job)) is not None:
        return f"{evaluating.stage}: {share(evaluating.done, evaluating.of, 'prompt')}"
    if job.state != JobState.GENERATING or job.total is None:
        return ""
    counts = job.counts
    return (
        f"of {counted(job.total, 'prompt')} {counts.sampled} {'has' if counts.sampled == 1 else 'have'} candidates, "
        f"{counts.decided} {'is' if counts.decided == 1 else 'are'} decided: "
        f"{counts.accepted} accepted, {counts.none} without a better answer, {counts.failed} failed"
    )


def _training(job: Job) -> Training | None:
    """The trainer's last word on the present run."""
    training = job.progress and job.state in (JobState.ALIGNING, JobState.TRAINING)
    return Training.model_validate(job.progress) if training else None


def _evaluating(job: Job) -> EvaluationProgress | None:
    """The trainer's last word on the round's evaluation, if it has one."""
    evaluating = job.progress and job.state == JobState.EVALUATING
    return EvaluationProgress.model_validate(job.progress) if evaluating else None


def _show_live(fetch: Callable[[], Job], every: float) -> Job:
    words, numbers = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[detail]}", markup=False)
    stage: TaskID | None = None
    at: tuple[int, JobState] | None = None
    with Progress(SpinnerColumn(), words, BarColumn(bar_width=20), TimeElapsedColumn(), numbers, console=console) as progress:
        while True:
            job = fetch()
            if (job.round, job.state) != at:
                if stage is not None:
                    progress.update(stage, total=1, completed=1)
                    progress.stop_task(stage)
                if job.state.ended:
                    return job
                at, stage = (job.round, job.state), progress.add_task(f"{job.state:<11}", total=None, detail=detail(job))
            assert stage is not None
            if (training := _training(job)) is not None:
                progress.update(stage, total=training.of, completed=training.step, detail=detail(job))
            elif (evaluating := _evaluating(job)) is not None:
                progress.update(stage, total=evaluating.of, completed=evaluating.done, detail=detail(job))
            elif job.state == JobState.GENERATING:
                progress.update(stage, total=job.total, completed=job.counts.decided, detail=detail(job))
            time.sleep(every)


def _show_lines(fetch: Callable[[], Job], every: float) -> Job:
    at: tuple[int, JobState] | None = None
    said, said_at, began = "", 0.0, time.monotonic()
    while True:
        job = fetch()
        words = f"{job.state:<11} {detail(job)}".rstrip()
        now = time.monotonic()
        if words != said and ((job.round, job.state) != at or now - said_at >= LINE_SECONDS):
            console.print(f"{now - began:6.0f} s  {words}", markup=False)
            said, said_at, at = words, now, (job.round, job.state)
        if job.state.ended:
            return job
        time.sleep(every)
