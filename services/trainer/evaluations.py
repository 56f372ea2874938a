"""Leads evaluations from queued to their end, the oldest first, one at a time: each takes its turn with the trainings.

What must survive a crash is in Redis (states) and in the evaluation's folder: one that was interrupted goes on where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress

import structlog
from redis.exceptions import RedisError

from services.common.background import end_tasks
from services.common.contract.evaluation_store import Evaluation, EvaluationStore
from services.common.contract.evaluations import EvaluationState, shown_files
from services.common.contract.records import Lease
from services.trainer.evaluator import Evaluator, Tell
from sipo.errors import Conflict, NotFound, SipoError
from sipo.evaluation.task import EvaluationProgress, TaskFolder
from sipo.resources import machine_told

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.5
"""Seconds between looks at the evaluations."""

Turn = Callable[[], AbstractAsyncContextManager[None]]
"""What only one at a time is in, while the decoders sleep."""


class Evaluations:
    def __init__(self, evaluator: Evaluator, store: EvaluationStore, lease: Lease, turn: Turn) -> None:
        self.evaluator = evaluator
        self.store = store
        self.lease = lease
        self.turn = turn

    async def run(self) -> None:
        """Until cancelled; ends when the lease is lost. Says what machine this is, for those who ask for evaluations."""
        machine = await asyncio.to_thread(machine_told, self.evaluator.settings.trainer_gpu_memory)
        while not self.lease.lost.is_set():
            try:
                await self.store.tell_machine(machine)
                if waiting := await self.store.list(EvaluationState.QUEUED, EvaluationState.RUNNING):
                    await self._lead(waiting[-1])
            except RedisError as error:  # the next look begins again with the state that stands
                log.warning("evaluations are interrupted", error=str(error))
            await asyncio.sleep(POLL_SECONDS)

    async def _lead(self, evaluation: Evaluation) -> None:
        """To its end, or until it is ended from outside."""
        work = asyncio.create_task(self._evaluate_safely(evaluation))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=POLL_SECONDS)
                if await self._ended(evaluation.id):
                    break
        finally:
            await end_tasks(work)
        if not work.cancelled():
            work.result()

    async def _ended(self, id: str) -> bool:
        try:
            return self.lease.lost.is_set() or (await self.store.get(id)).state.ended
        except NotFound:
            return True
        except RedisError:  # nobody can end it now
            return False

    async def _evaluate_safely(self, evaluation: Evaluation) -> None:
        with structlog.contextvars.bound_contextvars(evaluation=evaluation.id):
            try:
                await self._evaluate(evaluation)
            except RedisError:
                raise
            except Exception as error:
                await self._failed(evaluation, error)

    async def _evaluate(self, evaluation: Evaluation) -> None:
        folder = TaskFolder(self.evaluator.settings.evaluations_dir / evaluation.id)
        async with self.turn():
            if evaluation.state == EvaluationState.QUEUED:
                await self._advance(evaluation.id, EvaluationState.QUEUED, EvaluationState.RUNNING)
            await self.evaluator.run(folder, evaluation.spec, evaluation.id, self._teller(evaluation.id))
        artifacts = {name: name for name in shown_files(folder.front)}
        await self._advance(evaluation.id, EvaluationState.RUNNING, EvaluationState.COMPLETED, artifacts=artifacts)

    async def _failed(self, evaluation: Evaluation, error: Exception) -> None:
        try:
            current = await self.store.get(evaluation.id)
        except NotFound:
            log.info("deleted meanwhile", reason=str(error))
            return
        if current.state.ended or self.lease.lost.is_set():
            log.info("ended from outside", reason=str(error))
            return
        log.error("the evaluation failed", exc_info=error)
        reason = error.message if isinstance(error, SipoError) else f"{type(error).__name__}: {error}"
        with suppress(Conflict):  # cancelled in this very moment
            await self._advance(current.id, current.state, EvaluationState.FAILED, error=reason)

    async def _advance(self, id: str, before: EvaluationState, to: EvaluationState, **fields: object) -> None:
        await self.store.advance(id, before, to, lease=self.lease, **fields)
        log.info("evaluation", evaluation=id, state=str(to))

    def _teller(self, id: str) -> Tell:
        async def tell(progress: EvaluationProgress) -> None:
            # Progress that cannot be told is lost, and no reason to end the evaluation. A Conflict is one: it was cancelled.
            with suppress(RedisError):
                await self.store.update(id, lease=self.lease, progress=progress.model_dump())

        return tell
