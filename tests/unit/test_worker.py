"""What the generation worker decides by itself; what it says to others is in tests/integration/test_worker_queue.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.worker.generation import Generator, as_failed, seed_of, together
from services.common.contract.keys import DECISIONS
from services.common.contract.messages import PromptQueued
from services.common.web.clients import DecoderClient, ReviewerClient
from sipo.conversation import Message, as_messages
from sipo.errors import InvalidRequest, NotFound
from sipo.policies import PolicyStore
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from tests.fakes import WritingDecoder, write_policy_set
from tests.plans import sampling_plan

PLAN = sampling_plan(seed=3)
QUEUED = PromptQueued(
    job="job-1",
    round=1,
    prompt="0",
    example=Example(prompt="x", response_0="n", response_1="y", labels={"a": 1, "b": 0}),
    plan=PLAN,
)


def test_seeds_differ_by_plan_round_prompt_place_and_stage_only() -> None:
    others = [
        QUEUED.model_copy(update={"prompt": "1"}),
        QUEUED.model_copy(update={"round": 2}),
        QUEUED.model_copy(update={"plan": PLAN.model_copy(update={"seed": 4})}),
    ]
    chains = [(QUEUED, "0/0"), (QUEUED, "0/1"), (QUEUED, "1/0"), *((other, "0/0") for other in others)]
    seeds = {seed_of(*chain, stage) for chain in chains for stage in ("sample", "review", "rewrite")}
    assert len(seeds) == 3 * len(chains)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(QUEUED.model_copy(update={"job": "job-2"}), "0/0", "sample") == seed_of(QUEUED, "0/0", "sample")


async def test_a_teacher_that_this_worker_does_not_know_is_named(tmp_path: Path) -> None:
    """The gateway and its workers may have been started with different settings."""
    write_policy_set(tmp_path, "demo:1", ["a", "b"])
    decoder = DecoderClient("http://decoder", transport=httpx.ASGITransport(WritingDecoder().app))
    generator = Generator(decoder, ReviewerClient("http://none"), PolicyStore(tmp_path), teachers={})
    plan = PLAN.model_copy(update={"refine": False, "teachers": {"big": 1}})
    with pytest.raises(NotFound, match="no teacher 'big': set SIPO_TEACHERS"):
        await generator.generate(QUEUED.model_copy(update={"plan": plan}))


class Teacher:
    """Keeps what it was asked."""

    async def answer(self, messages: Any, **options: Any) -> tuple[str, str]:
        self.messages = messages
        return "Eight.", "stop"


@pytest.mark.parametrize("kind", ["chat", "raw"])
async def test_a_conversation_is_asked_as_the_policies_know_it(tmp_path: Path, kind: str) -> None:
    talk = (Message(role="user", content="x"), Message(role="assistant", content="y"), Message(role="user", content="z"))
    raw = PromptFormat(kind="raw", template="{prompt}\nA:")
    prompt_format = PromptFormat(system="be kind") if kind == "chat" else raw
    write_policy_set(tmp_path, "demo:1", ["a", "b"], prompt_format=prompt_format)
    fake, teacher = WritingDecoder(), Teacher()
    decoder = DecoderClient("http://decoder", transport=httpx.ASGITransport(fake.app))
    teachers: dict[str, Any] = {"big": teacher}
    generator = Generator(decoder, ReviewerClient("http://none"), PolicyStore(tmp_path), teachers)
    plan = PLAN.model_copy(update={"refine": False, "teachers": {"big": 1}})
    example = QUEUED.example.model_copy(update={"prompt": talk})
    made = await generator.generate(QUEUED.model_copy(update={"plan": plan, "example": example}))
    assert [candidate.stage for candidate in made.candidates] == ["sample", "distilled"]
    (body,) = fake.bodies
    if kind == "chat":
        told = [{"role": "system", "content": "be kind"}, *as_messages(talk)]
        assert body["messages"] == teacher.messages == told
    else:
        assert body["prompt"] == "User: x\n\nAssistant: y\n\nUser: z\nA:"
        assert teacher.messages == as_messages(talk)


async def test_the_first_error_ends_the_other_chains_and_is_raised_as_it_is() -> None:
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise InvalidRequest("too long")

    with pytest.raises(InvalidRequest, match="too long"):
        await together([waits(), fails()])
    assert ended.is_set()


def test_a_dead_prompt_becomes_a_failed_decision() -> None:
    stream, decision = as_failed(QUEUED, "invalid_request: too long")
    assert stream == DECISIONS
    assert (decision.id, decision.outcome, decision.error) == (QUEUED.id, "failed", "invalid_request: too long")
