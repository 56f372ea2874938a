from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.common.contract.messages import PromptDecided
from services.trainer.decisions import DecisionLog
from sipo.errors import Conflict, NotFound
from sipo.preferences import Example
from sipo.selection import Chosen

EXAMPLE = Example(prompt="x", response_0="a", response_1="b", labels={"warm": 1, "concise": 0})


def decided(prompt: int, outcome: str = "none", **fields: Any) -> PromptDecided:
    return PromptDecided.model_validate(
        {"job": "j", "round": 1, "prompt": str(prompt), "outcome": outcome, "example": EXAMPLE} | fields
    )


def test_a_decision_that_comes_twice_is_kept_once(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    log.append([decided(1), decided(2), decided(1)])
    log.append([decided(2), decided(3)])
    assert [one.prompt for one in log.read()] == ["1", "2", "3"]
    assert len(log.path.read_text().splitlines()) == 3


def test_a_new_log_knows_what_is_on_disk(tmp_path: Path) -> None:
    DecisionLog(tmp_path).append([decided(1), decided(2, "failed", error="no room")])
    again = DecisionLog(tmp_path)
    again.append([decided(1), decided(3)])
    assert [one.prompt for one in again.read()] == ["1", "2", "3"]
    assert again.counts(1) == {"decided": 3, "accepted": 0, "none": 2, "failed": 1}


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_a_crash_tore_is_cut_off_and_can_be_written_again(tmp_path: Path, left: int) -> None:
    log = DecisionLog(tmp_path)
    log.append([decided(1), decided(2)])
    first, second = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(first + second[:left])
    again = DecisionLog(tmp_path)
    assert again.decided(1) == 1 and log.path.read_bytes() == first
    again.append([decided(2)])
    assert log.path.read_bytes() == first + second


def test_a_failed_prompt_may_be_decided_later_but_a_decision_never_becomes_a_failure(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    chosen = [Chosen(candidate=0)]
    log.append([decided(1, "failed", error="a"), decided(2, "accepted", chosen=chosen)])
    log.append([decided(1, "accepted", chosen=chosen), decided(2, "failed", error="b"), decided(1, "failed", error="c")])
    assert {one.prompt: one.outcome for one in DecisionLog(tmp_path).read()} == {"1": "accepted", "2": "accepted"}
    assert log.counts(1) == {"decided": 2, "accepted": 2, "none": 0, "failed": 0}


def test_rounds_are_told_apart(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    log.append([decided(1), decided(1, round=2), decided(2, round=2)])
    assert (log.decided(1), log.decided(2)) == (1, 2)
    assert [one.id for one in log.read(2)] == ["j/2/1", "j/2/2"]


def test_a_damaged_line_in_the_middle_is_told_not_skipped(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    log.append([decided(1), decided(2)])
    log.path.write_bytes(log.path.read_bytes().replace(b'"j"', b"\x00\x00\x00", 1))
    with pytest.raises(Conflict, match="line 1 is damaged"):
        DecisionLog(tmp_path)


def test_decisions_of_a_job_without_a_folder_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no job folder"):
        DecisionLog(tmp_path / "gone")
