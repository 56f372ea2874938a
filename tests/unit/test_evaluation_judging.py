"""Rewards of all answers: kept as they come, and every failure told with its judge, method and prompt."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import nan
from pathlib import Path

import pytest

from sipo.conversation import Prompt
from sipo.errors import InvalidRequest, NotFound, SipoError, Unavailable
from sipo.evaluation.answers import Answer
from sipo.evaluation.folder import EvaluationFolder
from sipo.evaluation.judging import SAVED, Rewards, check_judges, judge
from sipo.evaluation.plan import Plan
from tests.evaluation import method_of, plan_of, silent


class Judge:
    """Rewards an answer with its length, but for what it is told to say of `wrong`."""

    def __init__(self, wrong: str = "", says: float | SipoError = 0.0) -> None:
        self.wrong, self.says = wrong, says
        self.asked: list[str] = []

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        self.asked += responses
        if self.wrong in responses:
            if isinstance(self.says, SipoError):
                raise self.says
            return [self.says for _ in responses]
        return [float(len(response)) for response in responses]


def answered(plan: Plan) -> dict[str, list[Answer]]:
    """Of each method to prompt 7 at its point 1, the text "mod 7 1"."""
    return {
        method.name: [
            Answer(prompt=index, weights=point, text=f"{method.name} {index} {number}", tokens=3, finish_reason="stop")
            for index in range(len(plan.prompts))
            for number, point in enumerate(method.points)
        ]
        for method in plan.methods
    }


def judged(plan: Plan, folder: Path, judges: dict[str, Judge]) -> dict[str, Rewards]:
    home = EvaluationFolder(folder)
    home.prepare(plan)
    with home.claimed():
        return judge(plan, answered(plan), home, silent, lambda address: judges[address.removeprefix("python:")])


def test_each_objective_has_its_judge_for_all_answers_and_the_originals(tiny_base: Path, tmp_path: Path) -> None:
    plan = plan_of([method_of(tiny_base, "base"), method_of(tiny_base, "mod")], prompts=2, originals=True)
    rewards = judged(plan, tmp_path / "out", {"concise": Judge(), "warm": Judge("mod 1 0", 0.5)})
    assert rewards["concise"] == {"base": [[8.0], [8.0]], "mod": [[7.0] * 3] * 2, None: [[8.0, 7.0], [8.0, 7.0]]}
    assert rewards["warm"]["mod"] == [[7.0] * 3, [0.5] * 3]


@pytest.mark.parametrize(
    ("says", "kind", "words"),
    [
        (nan, SipoError, r"it gave the reward nan, which is no finite number"),
        (Unavailable("it does not answer"), Unavailable, "it does not answer"),
        (InvalidRequest("too long"), InvalidRequest, "too long"),
    ],
)
def test_a_judge_that_fails_is_named_and_what_it_judged_before_stays(
    tiny_base: Path, tmp_path: Path, says: float | SipoError, kind: type[SipoError], words: str
) -> None:
    plan = plan_of([method_of(tiny_base, "mod")], prompts=3 * SAVED)
    failing = Judge(f"mod {SAVED + 2} 1", says)
    where = rf"the judge of warm \(python:warm\), on the answers of mod to prompt {SAVED + 2}, counted from 0: {words}"
    with pytest.raises(kind, match=where):
        judged(plan, tmp_path / "out", {"concise": Judge(), "warm": failing})
    file = tmp_path / "out" / "scores" / "warm.jsonl"
    assert len(file.read_text().splitlines()) == SAVED
    with file.open("a") as torn:
        torn.write('{"method":"mo')

    mended = Judge()
    rewards = judged(plan, tmp_path / "out", {"warm": mended})  # concise is not even opened
    assert mended.asked[0] == f"mod {SAVED} 0"
    assert rewards["warm"] == rewards["concise"] == judged(plan, tmp_path / "whole", {"concise": Judge(), "warm": Judge()})["warm"]


def test_a_judge_is_released_before_the_next_is_opened(tiny_base: Path, tmp_path: Path) -> None:
    """Two models at once may be more than there is room for."""
    home, plan = EvaluationFolder(tmp_path / "out"), plan_of([method_of(tiny_base, "mod")])
    home.prepare(plan)
    opened: list[weakref.ref[Judge]] = []

    def open_judge(address: str) -> Judge:
        assert not [one for one in opened if one() is not None]
        judge = Judge()
        opened.append(weakref.ref(judge))
        return judge

    with home.claimed():
        judge(plan, answered(plan), home, silent, open_judge)
    assert len(opened) == 2


def test_rewards_of_something_else_are_told(tiny_base: Path, tmp_path: Path) -> None:
    plan = plan_of([method_of(tiny_base, "mod")])
    judged(plan, tmp_path / "out", {"concise": Judge(), "warm": Judge()})
    file = tmp_path / "out" / "scores" / "concise.jsonl"
    file.write_text(file.read_text().replace('"prompt":1', '"prompt":3'))
    with pytest.raises(InvalidRequest, match=r"concise.jsonl holds other rewards: remove it"):
        judged(plan, tmp_path / "out", {})


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("python:nothing", NotFound, r"the judge of warm \(python:nothing\): no reward model 'nothing'"),
        ("hf:./no-such-folder", NotFound, "no model './no-such-folder'"),
        ("warm", InvalidRequest, "'warm' is no address"),
    ],
)
def test_a_judge_that_is_not_there_is_told_before_anything(
    address: str, kind: type[SipoError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind, match=words):
        check_judges({"concise": "python:concise", "warm": address})
