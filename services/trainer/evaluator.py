"""An evaluation in a process of its own, as this trainer's settings have it."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import TypeAdapter

from services.common.contract.evaluation_tasks import task_of
from services.common.contract.evaluations import EvaluationSpec
from services.common.local.child import Work
from services.trainer.settings import TrainerSettings
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.summary import Context
from sipo.evaluation.task import EvaluationProgress, TaskFolder
from sipo.training.settings import Failure

MODULE = ("-m", "sipo.evaluation")
LINE: TypeAdapter[EvaluationProgress | Failure] = TypeAdapter(EvaluationProgress | Failure)

Tell = Callable[[EvaluationProgress], Awaitable[None]]
"""Hears how far an evaluation is."""


@dataclass(frozen=True)
class Evaluator:
    settings: TrainerSettings
    command: tuple[str, ...] = (sys.executable, *MODULE)

    async def run(
        self, folder: TaskFolder, spec: EvaluationSpec, name: str, tell: Tell, context: Context | None = None
    ) -> EvaluationReport:
        """In `folder`, where its prompts are; goes on with what is there, and ends the process if cancelled. Raises a SipoError
        with what went wrong."""
        task = task_of(spec, name, self.settings)
        folder.ask(task if context is None else task.model_copy(update={"context": context}))
        done: dict[str, int] = {}

        async def hear(told: EvaluationProgress) -> int:
            done[told.stage] = max(done.get(told.stage, 0), told.done)
            await tell(told)
            return sum(done.values())

        command = [*self.command, "--gpu-memory", str(self.settings.trainer_gpu_memory), str(folder.path)]
        await Work("evaluation", command, folder.log, LINE, hear).run()
        return folder.report()
