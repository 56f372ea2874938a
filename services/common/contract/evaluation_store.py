"""Evaluations in Redis: what they are, which state may follow which, and the machine that they will run on."""

from __future__ import annotations

from typing import Any, Final, cast

from pydantic import Field, ValidationError
from redis.asyncio import Redis

from services.common.contract.evaluations import EvaluationSpec, EvaluationState
from services.common.contract.keys import EVALUATIONS, MACHINE, evaluation_key
from services.common.contract.records import Kind, RecordStore, Stored
from sipo.evaluation.needs import Needs
from sipo.resources import Machine


class Evaluation(Stored):
    spec: EvaluationSpec
    state: EvaluationState
    prompts: int = Field(default=0, description="how many")
    runs_on: Needs | None = Field(default=None, description="None as long as no trainer has said what machine it has")
    progress: dict[str, Any] = Field(default={}, description="stage, and how many of its prompts are done")
    error: str | None = None
    artifacts: dict[str, str] = Field(default={}, description="file by name, to be asked for behind the evaluation's own path")


KIND: Final = Kind(
    name="evaluation",
    record=Evaluation,
    states=EvaluationState,
    index=EVALUATIONS,
    key=evaluation_key,
    next={
        EvaluationState.QUEUED: frozenset({EvaluationState.RUNNING}),
        EvaluationState.RUNNING: frozenset({EvaluationState.COMPLETED}),
    },
    blank={
        "id": "",
        "spec": EvaluationSpec(methods=["base"], judges={"a": "", "b": ""}),
        "state": EvaluationState.QUEUED,
        "created": 0,
        "updated": 0,
    },
)


class EvaluationStore(RecordStore[Evaluation, EvaluationState]):
    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, KIND)

    async def tell_machine(self, machine: Machine) -> None:
        """The trainer's, on which evaluations run."""
        await self.redis.set(MACHINE, machine.model_dump_json())

    async def machine(self) -> Machine | None:
        """As the trainer told it last; None if none ever did."""
        told = cast(str | None, await self.redis.get(MACHINE))
        try:
            return None if told is None else Machine.model_validate_json(told)
        except ValidationError:  # of a trainer of another release
            return None
