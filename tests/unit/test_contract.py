"""Records and messages that outlive the release that wrote them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from services.common.contract.messages import PromptDecided, PromptQueued, PromptSampled
from services.common.contract.reports import Report
from sipo.errors import Conflict
from sipo.preferences import Example
from tests.plans import sampling_plan

EXAMPLE = Example(prompt="x", response_0="n", response_1="y", labels={"a": 1, "b": 0})
QUEUED = PromptQueued(job="a/b", round=2, prompt="7", example=EXAMPLE, plan=sampling_plan())
SAMPLED = PromptSampled(queued=QUEUED, candidates=[])
DECIDED = PromptDecided(job="a/b", round=2, prompt="7", outcome="none", example=EXAMPLE)


@pytest.mark.parametrize("message", [QUEUED, SAMPLED, DECIDED])
def test_every_message_knows_its_prompt(message: PromptQueued | PromptSampled | PromptDecided) -> None:
    assert (message.job, message.round, message.prompt, message.id) == ("a/b", 2, "7", "a/b/2/7")


def test_what_a_queue_and_a_log_hold_is_written_as_ever() -> None:
    """Services are upgraded one by one, while messages wait: one that reads and writes otherwise is a new version."""
    queued = {
        "version": 1,
        "job": "a/b",
        "round": 2,
        "prompt": "7",
        "example": json.loads(EXAMPLE.model_dump_json()),
        "plan": json.loads(sampling_plan().model_dump_json()),
    }
    assert json.loads(QUEUED.model_dump_json()) == queued
    assert json.loads(SAMPLED.model_dump_json()) == {"version": 1, "queued": queued, "candidates": []}
    assert {name: value for name, value in json.loads(DECIDED.model_dump_json()).items() if name not in ("example", "outcome")} == {
        "version": 1,
        "job": "a/b",
        "round": 2,
        "prompt": "7",
        "chosen": [],
        "candidates": [],
        "rewards_0": None,
        "rewards_1": None,
        "error": None,
    }
    for message in (QUEUED, SAMPLED, DECIDED):
        assert type(message).model_validate_json(message.model_dump_json()) == message


def test_a_message_of_another_version_is_not_readable() -> None:
    """The queue makes a dead message of it, and says why."""
    for message in (QUEUED, SAMPLED, DECIDED):
        with pytest.raises(ValidationError, match="version"):
            type(message).model_validate(message.model_dump() | {"version": 2})


def test_a_report_of_another_release_is_refused_and_one_without_a_version_read() -> None:
    fields: dict[str, Any] = {
        "job": "job-1",
        "policy": "demo",
        "objectives": ["a", "b"],
        "alignment": {},
        "rounds": [],
        "policy_set": None,
        "activated": False,
        "reason": None,
    }
    assert Report.model_validate_json(json.dumps(fields)) == Report(**fields)
    assert Report(**fields).version == 1
    with pytest.raises(Conflict, match="Report job-1 was written by another release: its version is 2, this one reads version 1"):
        Report.model_validate_json(json.dumps({"version": 2, "job": "job-1", "rounds": "other"}))
