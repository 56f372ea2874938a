"""How callers share the model's passes. The model is a stand-in that says what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from services.scorer.passes import Passes
from sipo.preferences import Weights
from sipo.rewards import Group, Rewards

BUDGET = 100
SOUP = {"a": 0.5, "b": 0.5}


class AskedModel:
    """Rewards each response by its first token; a prompt [13] is an error. Waits in its first pass until it may `go`."""

    token_budget = BUDGET

    def __init__(self) -> None:
        self.passes: list[tuple[str, int, list[int]]] = []
        self.go = threading.Event()

    def score(self, policy_set: str, groups: Sequence[Group], soups: Sequence[Weights]) -> list[list[Rewards]]:
        assert self.go.wait(10)
        self.passes.append((policy_set, len(soups), [group.prompt[0] for group in groups]))
        if any(group.prompt[0] == 13 for group in groups):
            raise ValueError("unlucky")
        return [[{"a": float(ids[0])} for ids in group.responses] for group in groups]


@pytest.fixture
def model() -> AskedModel:
    return AskedModel()


@pytest_asyncio.fixture
async def passes(model: AskedModel) -> AsyncIterator[Passes]:
    load: Any = lambda: model  # noqa: E731
    async with Passes(load) as passes:
        yield passes
        model.go.set()


def group(prompt: int, responses: int = 1, length: int = 9) -> Group:
    return Group([prompt], [[index, *[0] * (length - 1)] for index in range(responses)])


async def score(passes: Passes, policy_set: str, asked: Group, soups: Sequence[Weights] = ()) -> list[Rewards]:
    return [rewards async for some in passes.stream(policy_set, asked, soups) for rewards in some]


async def begun(passes: Passes, *asked: Any) -> list[asyncio.Task[list[Rewards]]]:
    """All wait for rewards, the first of them in the model's hands."""
    tasks = []
    for one in asked:
        tasks.append(asyncio.create_task(one))
        await asyncio.sleep(0.01)
    return tasks


async def test_what_waits_for_the_same_models_shares_a_pass_as_far_as_the_budget_holds_it(
    model: AskedModel, passes: Passes
) -> None:
    tasks = await begun(passes, *(score(passes, "s:1", group(prompt, responses=3), [SOUP]) for prompt in range(1, 6)))
    model.go.set()
    for found in await asyncio.gather(*tasks):
        assert found == [{"a": 0.0}, {"a": 1.0}, {"a": 2.0}]
    assert model.passes == [("s:1", 1, [1]), ("s:1", 1, [2, 3, 4]), ("s:1", 1, [5])]  # 28 tokens each


async def test_other_sets_and_other_soups_have_passes_of_their_own(model: AskedModel, passes: Passes) -> None:
    asked = [("s:1", []), ("s:1", [SOUP]), ("s:2", [SOUP]), ("s:2", [SOUP])]
    tasks = await begun(passes, *(score(passes, name, group(index), soups) for index, (name, soups) in enumerate(asked)))
    model.go.set()
    await asyncio.gather(*tasks)
    assert model.passes == [("s:1", 0, [0]), ("s:1", 1, [1]), ("s:2", 1, [2, 3])]


async def test_a_caller_with_many_responses_lets_others_in_between(model: AskedModel, passes: Passes) -> None:
    long = score(passes, "s:1", group(1, responses=200))
    tasks = await begun(passes, long, score(passes, "s:2", group(2)))
    model.go.set()
    found = await asyncio.gather(*tasks)
    assert [one["a"] for one in found[0]] == list(range(200))
    assert [name for name, _, _ in model.passes].index("s:2") == 2


async def test_an_error_is_that_of_its_own_caller(model: AskedModel, passes: Passes) -> None:
    tasks = await begun(passes, *(score(passes, "s:1", group(prompt)) for prompt in (1, 12, 13, 14)))
    model.go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(one) if isinstance(one, ValueError) else len(one) for one in found if isinstance(one, (ValueError, list))] == [
        1,
        1,
        "unlucky",
        1,
    ]


async def test_what_a_caller_that_left_waited_for_is_not_computed(model: AskedModel, passes: Passes) -> None:
    (long,) = await begun(passes, score(passes, "s:1", group(1, responses=200)))
    long.cancel()
    await asyncio.wait([long])
    model.go.set()
    await score(passes, "s:2", group(2))
    assert model.passes == [("s:1", 0, [1]), ("s:2", 0, [2])]
