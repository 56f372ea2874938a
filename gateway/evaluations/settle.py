"""Whether an evaluation can be made, told when it is asked for: its methods, judges, prompts, and the memory that it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gateway.settings import GatewaySettings
from gateway.shipped import get_set
from services.common.contract.evaluation_tasks import task_of
from services.common.contract.evaluations import EvaluationSpec
from services.common.contract.job_files import JobFiles
from sipo.conversation import Prompt, as_prompt
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.methods import METHOD_NAME
from sipo.evaluation.needs import Needs
from sipo.evaluation.prompts import TestPrompt, check_unseen
from sipo.policies import POLICY_NAME, SET_VERSION, JobRound, PolicySet, PolicyStore
from sipo.resources import Machine
from sipo.training.run_folder import RunFolder

_NAME = rf"{METHOD_NAME.pattern}(?:@[0-9]{{1,9}})?"  # with the seed of a training
_BASE = re.compile(rf"({_NAME}=)?base")
_OF_SET = re.compile(rf"(?P<how>{_NAME}=(?:mod|soup|reference)):(?P<set>{POLICY_NAME.pattern}(?::{SET_VERSION.pattern})?)")


def settle(
    spec: EvaluationSpec, prompts: Sequence[TestPrompt], settings: GatewaySettings, machine: Machine | None
) -> tuple[EvaluationSpec, Needs | None]:
    """The specification with the versions of its sets, and what it needs on the trainer's `machine`, if that is known.

    Raises InvalidRequest for all that can be known before anything is generated: sets and judges that are not there, prompts that
    are too long or were trained on, and what does not fit into the machine.
    """
    try:
        methods, sets = _pinned(spec, settings)
        settled = spec.model_copy(update={"methods": methods})
        for chosen in sets:
            for where, trained in trained_prompts(chosen, settings.policies, settings.jobs_dir):
                check_unseen(prompts, trained, where)
        task = task_of(settled, "", settings)
        return settled, task.check(task.plan(prompts), machine)
    except NotFound as error:  # what is missing is no page of ours
        raise InvalidRequest(error.message, param=error.param) from error


def trained_prompts(chosen: PolicySet, store: PolicyStore, jobs_dir: Path) -> Iterator[tuple[str, list[Prompt]]]:
    """What a set and those that it descends from were trained on, and where, as far as their jobs' folders are there."""
    line: PolicySet | None = chosen
    while line is not None:
        made_by = line.manifest.made_by
        if isinstance(made_by, JobRound):
            for objective in line.objectives:
                run = RunFolder(JobFiles(jobs_dir / made_by.job).training_run(made_by.round, objective))
                if run.pairs_file.is_file():
                    yield f"of {line.id}", [as_prompt(pair["prompt"]) for pair in run.pairs()]
        line = _parent(line, store)


def _parent(chosen: PolicySet, store: PolicyStore) -> PolicySet | None:
    try:
        return store.get(chosen.manifest.parent) if chosen.manifest.parent is not None else None
    except NotFound:
        return None


def _pinned(spec: EvaluationSpec, settings: GatewaySettings) -> tuple[list[str], list[PolicySet]]:
    """The methods, whose sets are named with their versions, as what is current may change before they answer; and these sets."""
    methods, sets = [], []
    for text in spec.methods:
        if _BASE.fullmatch(text):
            methods.append(text)
            continue
        found = _OF_SET.fullmatch(text)
        if found is None:
            raise InvalidRequest(
                f"the method {text!r} is none that can be asked for over HTTP: write base, or NAME=mod:SET, NAME=soup:SET or "
                "NAME=reference:SET with a policy set of this system as SET, NAME or NAME:VERSION; folders and files of its disk "
                "are for `sipo evaluate`",
                param="methods",
            )
        sets.append(get_set(settings, found["set"]))
        methods.append(f"{found['how']}:{sets[-1].id}")
    return methods, sets
