"""An evaluation that is asked for in writing, for a process of its own: `python -m sipo.evaluation FOLDER`.

task.json         a Task
prompts.jsonl     a TestPrompt a line
evaluation.log    what libraries said
front/            the evaluation's own folder (sipo.evaluation.folder), with its report and its page
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from sipo.evaluation.folder import PROMPTS, REPORT, RowFile
from sipo.evaluation.judging import open_judge
from sipo.evaluation.methods import Methods
from sipo.evaluation.needs import Needs, needs_of
from sipo.evaluation.plan import Plan, open_methods, points_of
from sipo.evaluation.prompts import TestPrompt
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.reward_models import RewardFunction
from sipo.evaluation.run import check_plan, evaluate
from sipo.evaluation.summary import Context
from sipo.files import write_atomically
from sipo.policies import PolicyStore
from sipo.record import Record
from sipo.resources import KV_CACHE_GIB, Machine, this_machine

FREE_PART = 0.95
"""Of a GPU's free memory: the engine refuses to start where it finds a little less than it was promised."""


class EvaluationProgress(Record):
    """How far it is, printed as a line of JSON: `done` of the prompts of a stage, such as "answers of demo"."""

    stage: str
    done: int
    of: int


class Task(Record):
    """What is evaluated, in the words of `sipo evaluate`'s options, and where bases and policy sets lie."""

    name: str
    methods: list[str]
    judges: dict[str, str]
    weights: list[str] = Field(default=[])
    max_tokens: int
    against: list[str] = Field(default=[])
    seed: int = 0
    context: Context = Field(default=Context(), description="shown beside what is measured")
    model: str
    cache_dir: Path
    policies: Path

    def plan(self, prompts: Sequence[TestPrompt]) -> Plan:
        """Raises a SipoError for what does not fit together."""
        objectives = list(self.judges)
        points = points_of(objectives, self.weights)
        methods = Methods(self.model, self.cache_dir, PolicyStore(self.policies).get, objectives, points)
        return Plan(self.name, prompts, open_methods(methods, self.methods), self.judges, self.max_tokens)

    def check(self, plan: Plan, machine: Machine | None) -> Needs | None:
        """All that can be known before anything is generated: raises a SipoError for what cannot be evaluated. The result is what
        it needs on `machine`, where that is known."""
        ids = check_plan(plan, self.against)
        if machine is None:
            return None
        needs = needs_of(plan, ids, machine)
        needs.check()
        return needs


@dataclass(frozen=True)
class TaskFolder:
    path: Path

    @property
    def task_file(self) -> Path:
        return self.path / "task.json"

    @property
    def prompts_file(self) -> Path:
        return self.path / PROMPTS

    @property
    def log(self) -> Path:
        return self.path / "evaluation.log"

    @property
    def front(self) -> Path:
        return self.path / "front"

    def ask(self, task: Task) -> None:
        """The prompts are there already. A judge's address may hold a key: the file is its owner's alone."""
        write_atomically(self.task_file, task.model_dump_json(indent=1))

    def prompts(self) -> list[TestPrompt]:
        return RowFile(self.prompts_file, TestPrompt).read()

    def report(self) -> EvaluationReport:
        return EvaluationReport.model_validate_json((self.front / REPORT).read_bytes())


def run(folder: TaskFolder, tell: Callable[[EvaluationProgress], None], gpu_memory: float = 1.0) -> EvaluationReport:
    """Evaluates what the folder's task says, or goes on with it, on this machine. `gpu_memory` is the part of a GPU's memory that
    it may take. Raises a SipoError, also where this machine has not the memory for it."""
    task = Task.model_validate_json(folder.task_file.read_bytes())
    plan, machine = task.plan(folder.prompts()), _free(this_machine(gpu_memory))
    task.check(plan, machine)

    def told(stage: str, done: int, of: int) -> None:
        tell(EvaluationProgress(stage=stage, done=done, of=of))

    def open_decoder(model: Path, policies: Mapping[str, Path], **how: Any) -> AbstractContextManager[Any]:
        return _engine(model, policies, machine, **how)

    def open_limited(address: str) -> RewardFunction:
        _limit(machine)
        return open_judge(address)

    return evaluate(
        plan,
        folder.front,
        told,
        against=task.against,
        seed=task.seed,
        context=task.context,
        open_decoder=open_decoder,
        open_judge=open_limited,
    )


def _engine(model: Path, policies: Mapping[str, Path], machine: Machine, **how: Any) -> AbstractContextManager[Any]:
    from sipo.decoding import OfflineDecoder  # with torch, which takes seconds to import

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if machine.gpu:
        how["gpu_memory_utilization"] = _part(machine)
    return OfflineDecoder(model, policies, kv_cache_gib=KV_CACHE_GIB, use_tqdm_on_load=False, **how)


def _free(machine: Machine) -> Machine:
    """With what other processes leave of a GPU now."""
    import torch

    if not machine.gpu:
        return machine
    free, _ = torch.cuda.mem_get_info(0)
    return machine.model_copy(update={"memory": min(machine.memory, int(FREE_PART * free))})


def _limit(machine: Machine) -> None:
    """What a judge takes of the GPU. Only once the engine has ended, which keeps to its part itself."""
    import torch

    if machine.gpu:
        torch.cuda.set_per_process_memory_fraction(_part(machine), 0)


def _part(machine: Machine) -> float:
    import torch

    return machine.memory / torch.cuda.get_device_properties(0).total_memory
