"""What a caller asks of an evaluation, as the task of a process (sipo.evaluation.task): the same for whoever checks it at once and
whoever runs it later."""

from __future__ import annotations

from services.common.contract.evaluations import EvaluationSpec, judge_address
from services.common.settings import JudgeSettings
from sipo.evaluation.task import Task


def task_of(spec: EvaluationSpec, name: str, settings: JudgeSettings) -> Task:
    """`name`: the page's title, if the caller gave none. Raises InvalidRequest for a judge that this system does not have."""
    return Task(
        name=spec.name or name,
        methods=spec.methods,
        judges={objective: judge_address(judge, settings.evaluation_judges) for objective, judge in spec.judges.items()},
        weights=spec.weight_texts(),
        max_tokens=spec.max_tokens,
        against=spec.against,
        seed=spec.seed,
        model=settings.model,
        cache_dir=settings.cache_dir,
        policies=settings.policies.root,
    )
