"""The model's thread, and what waits for it: messages and HTTP callers ask for rewards here, and share its passes.

What waits is taken in order, as much as a pass holds, if it is for the same policy set and soups. A caller with many responses has
only a few pieces waiting at a time, so that others come in between; and the event loop is free for heartbeats however long a pass
takes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from prometheus_client import Histogram

from services.common.background import begin, end_tasks
from sipo.preferences import Weights
from sipo.rewards import Group, RewardModel, Rewards

AHEAD = 2
"""Pieces of one caller that wait at a time: the next is there when a pass ends."""

PASS_SECONDS = Histogram("sipo_scorer_pass_seconds", "Time of a pass", buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60))
PASS_PIECES = Histogram("sipo_scorer_pass_pieces", "Prompts, or parts of their responses, in a pass", buckets=(1, 2, 4, 8, 16, 32))


@dataclass(frozen=True, eq=False)
class Piece:
    """Some responses to one prompt; their rewards are the future's result."""

    policy_set: str
    soups: Sequence[Weights]
    group: Group
    rewards: asyncio.Future[list[Rewards]]

    def shares_pass(self, other: Piece) -> bool:
        return self.policy_set == other.policy_set and self.soups == other.soups


class Passes:
    """Scores in a thread of its own, the only one that touches the model; `load` makes the model there."""

    def __init__(self, load: Callable[[], RewardModel]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._waiting: deque[Piece] = deque()
        self._filled = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.model = await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        self._task = begin(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await end_tasks(self._task)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def stream(self, policy_set: str, group: Group, soups: Sequence[Weights] = ()) -> AsyncIterator[list[Rewards]]:
        """RewardModel.score for one group, in the order of its responses, as they are done. `policy_set` is a set's id: a name's
        current set may change while pieces wait."""
        ahead: deque[asyncio.Future[list[Rewards]]] = deque()
        try:
            for piece in group.cut(self.model.token_budget):
                if len(ahead) == AHEAD:
                    yield await ahead.popleft()
                ahead.append(self._enqueue(policy_set, piece, soups))
            while ahead:
                yield await ahead.popleft()
        finally:
            for future in ahead:  # the caller is gone: what it waited for is not computed
                future.cancel()

    def _enqueue(self, policy_set: str, group: Group, soups: Sequence[Weights]) -> asyncio.Future[list[Rewards]]:
        future: asyncio.Future[list[Rewards]] = asyncio.get_running_loop().create_future()
        self._waiting.append(Piece(policy_set, soups, group, future))
        self._filled.set()
        return future

    async def _run(self) -> None:
        while True:
            await self._filled.wait()
            if pieces := self._next():
                await self._pass(pieces)
            else:
                self._filled.clear()

    def _next(self) -> list[Piece]:
        """The oldest piece that is still wanted, and with it those for the same models, as far as the budget holds them."""
        waiting = [piece for piece in self._waiting if not piece.rewards.done()]
        taken: list[Piece] = []
        tokens = 0
        for piece in waiting:
            tokens += piece.group.tokens
            if taken and (tokens > self.model.token_budget or not piece.shares_pass(taken[0])):
                break
            taken.append(piece)
        self._waiting = deque(waiting[len(taken) :])
        return taken

    async def _pass(self, pieces: Sequence[Piece]) -> None:
        first, groups = pieces[0], [piece.group for piece in pieces]
        try:
            with PASS_SECONDS.time():
                found = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self.model.score, first.policy_set, groups, first.soups
                )
        except Exception as error:
            if len(pieces) > 1:  # the others need not suffer for one
                for piece in pieces:
                    await self._pass([piece])
            elif not first.rewards.done():
                first.rewards.set_exception(error)
            return
        PASS_PIECES.observe(len(pieces))
        for piece, rewards in zip(pieces, found, strict=True):
            if not piece.rewards.done():
                piece.rewards.set_result(rewards)
