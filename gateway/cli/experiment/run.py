"""Runs the steps of an experiment that are not finished, one after the other."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gateway.cli.console import console
from gateway.cli.experiment.evaluation import run_evaluation
from gateway.cli.experiment.rounds import run_round
from gateway.cli.experiment.show import time_left
from gateway.cli.experiment.training import align, cut, fine_tune, lw, modpo, more_training
from gateway.cli.experiment.workplace import Made, Workplace
from gateway.experiments.plan import Plan, Step
from gateway.experiments.published import publish_seed
from gateway.experiments.result import Result, seconds, timed, write_result
from gateway.experiments.summary import Summary, write_summary
from sipo.errors import Conflict

MAKE: Mapping[str, Callable[[Workplace, Step, Any], Made]] = {
    "subset": cut,
    "sft": fine_tune,
    "align": align,
    "lw": lw,
    "modpo": modpo,
    "round": run_round,
    "more_training": more_training,
    "evaluate": run_evaluation,
}
"""By kind: the last argument is the stage, of that kind's class."""
LOCK = ".lock"


def run_experiment(at: Workplace, seeds: Sequence[int]) -> Summary:
    """Of the seeds alone; the summary is of all that have results. Raises what a step raises: the same call goes on with it."""
    plan = at.plan
    steps = plan.steps_of(seeds)
    plan.write_data()
    with _claimed(plan):
        for number, step in enumerate(steps, start=1):
            if step.result() is not None:
                continue
            console.print(f"{number} of {len(steps)}: {step.name} ({step.stage.kind})", markup=False)
            step.folder.mkdir(parents=True, exist_ok=True)
            with timed(step.folder):
                made = MAKE[step.stage.kind](at, step, step.stage)
            result = Result(
                stage=step.stage.name,
                kind=step.stage.kind,
                seed=step.seed,
                key=step.key,
                seconds=round(seconds(step.folder), 1),
                parts=made.parts,
                tokens=made.tokens,
                policy_set=made.policy_set,
            )
            write_result(step.folder, result)
            if step.seed is not None:
                publish_seed(plan, step.seed)
                write_summary(plan)
            console.print(f"{step.name}: {result.seconds:.0f} s; {time_left(plan, steps)}", markup=False)
        for seed in seeds:
            publish_seed(plan, seed)
        return write_summary(plan)


@contextmanager
def _claimed(plan: Plan) -> Iterator[None]:
    """Raises Conflict while another process runs an experiment there: both might make the same steps."""
    with (plan.root / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another process runs an experiment in {plan.root}: wait for it, or stop it") from error
        yield
