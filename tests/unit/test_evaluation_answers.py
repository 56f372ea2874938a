"""Answers come in chunks, survive what stops them, and are those that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sipo.errors import Conflict, InvalidRequest
from sipo.evaluation.answers import CHUNK, Answer, engines, generate, prompt_ids
from sipo.evaluation.folder import EvaluationFolder
from sipo.evaluation.plan import Plan
from tests.evaluation import FakeEngine, method_of, plan_of, silent


def generated(plan: Plan, folder: Path, engine: FakeEngine) -> dict[str, list[Answer]]:
    home = EvaluationFolder(folder)
    home.prepare(plan)
    with home.claimed():
        return generate(plan, prompt_ids(plan), home, silent, engine.open)


def test_methods_of_the_same_adapters_share_an_engine_and_the_base_joins_one(tiny_base: Path, tmp_path: Path) -> None:
    kinds = [("base", "demo"), ("mod", "demo"), ("soup", "demo"), ("models", "lw")]
    methods = [method_of(tiny_base, kind, adapters=adapters) for kind, adapters in kinds]  # type: ignore[arg-type]
    engine = FakeEngine()
    answers = generated(plan_of(methods, prompts=2), tmp_path / "out", engine)

    longest = len("What is 0?\n") + 8
    demo = {"concise": Path("demo/concise"), "warm": Path("demo/warm")}
    models = {key: Path("lw", key) for key in ("concise=0,warm=1", "concise=0.5,warm=0.5", "concise=1,warm=0")}
    assert engine.started == [
        {"model": tiny_base, "policies": demo, "reference": None, "slots": 2, "ranks": 5, "max_model_len": longest},
        {"model": tiny_base, "policies": models, "reference": None, "slots": 1, "ranks": 9, "max_model_len": longest},
    ]
    assert [answer.text for answer in answers["base"]] == ["base  11"] * 2
    places = [f"concise={c},warm={w}" for c, w in ((0, 1), (0.5, 0.5), (1, 0))]
    assert [answer.text for answer in answers["mod"]] == [f"mod {place} 11" for place in places] * 2
    # A policy that has all the weight says the same in a soup: it is not asked again.
    kinds_asked = ("mod", "soup", "mod")
    assert [answer.text for answer in answers["soup"]] == [f"{k} {p} 11" for k, p in zip(kinds_asked, places, strict=True)] * 2
    assert engine.batches == [3 * 2, 1 * 2, 2, 3 * 2]
    one_hot = [",".join(f"{key}={int(key == own)}" for key in models) for own in models]
    assert [answer.text for answer in answers["models"]] == [f"soup {place} 11" for place in one_hot] * 2
    assert answers["mod"][4] == Answer(
        prompt=1, weights={"concise": 0.5, "warm": 0.5}, text=answers["mod"][4].text, tokens=5, finish_reason="stop"
    )


def test_an_engine_has_one_reference_which_answers_alone_there_and_the_base_joins_any(tiny_base: Path, tmp_path: Path) -> None:
    methods = [
        method_of(tiny_base, "base"),
        method_of(tiny_base, "reference", reference="tuned"),
        method_of(tiny_base, "reference", "own", reference="other"),
        method_of(tiny_base, "reference", "none"),
        method_of(tiny_base, "mod", reference="tuned"),
        method_of(tiny_base, "soup", reference="tuned"),
        method_of(tiny_base, "soup", "plain"),
    ]
    engine = FakeEngine()
    answers = generated(plan_of(methods, prompts=2), tmp_path / "out", engine)

    grouped = [[method.name for method in one.methods] for one in engines(methods)]
    assert grouped == [["mod", "soup", "reference", "base"], ["plain", "none"], ["own"]]
    assert [(one["reference"], len(one["policies"]), one["slots"], one["ranks"]) for one in engine.started] == [
        (Path("tuned"), 2, 2, 2 + 3 + 4),
        (None, 2, 1, 2 + 3),
        (Path("other"), 0, 1, 4),
    ]
    for name in ("reference", "own", "none"):
        assert [(answer.weights, answer.text) for answer in answers[name]] == [(None, "reference  11")] * 2


def test_the_base_alone_has_an_engine_without_adapters(tiny_base: Path, tmp_path: Path) -> None:
    engine = FakeEngine()
    generated(plan_of([method_of(tiny_base, "base")]), tmp_path / "out", engine)
    assert [(one["policies"], one["slots"], one["ranks"]) for one in engine.started] == [({}, 1, 1)]


def test_a_killed_run_loses_a_chunk_at_most_and_ends_with_the_same_answers(tiny_base: Path, tmp_path: Path) -> None:
    plan = plan_of([method_of(tiny_base, "mod"), method_of(tiny_base, "soup")], prompts=2 * CHUNK + 3)
    whole = generated(plan, tmp_path / "whole", FakeEngine())
    with pytest.raises(KeyboardInterrupt):
        generated(plan, tmp_path / "out", FakeEngine(most=2))
    file = tmp_path / "out" / "answers" / "mod.jsonl"
    assert len(file.read_text().splitlines()) == 2 * 3 * CHUNK
    torn = file.read_bytes()[:-700]  # killed while it wrote, a chunk is whole or begun again
    file.write_bytes(torn)

    engine = FakeEngine()
    assert generated(plan, tmp_path / "out", engine) == whole
    assert engine.batches == [3 * CHUNK, 3 * 3, CHUNK, CHUNK, 3]
    for name in ("mod", "soup"):
        assert (tmp_path / "out" / "answers" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "whole" / "answers" / f"{name}.jsonl"
        ).read_bytes()
    again = FakeEngine()
    assert generated(plan, tmp_path / "out", again) == whole
    assert again.started == []


def test_answers_of_another_plan_are_never_mixed(tiny_base: Path, tmp_path: Path) -> None:
    plan = plan_of([method_of(tiny_base, "mod")])
    generated(plan, tmp_path / "out", FakeEngine())
    before = (tmp_path / "out" / "answers" / "mod.jsonl").read_bytes()
    for other, words in (
        (plan_of([method_of(tiny_base, "mod", adapters="other")]), "begun with other methods: evaluate in another folder"),
        (plan_of([method_of(tiny_base, "mod")], prompts=5), "begun with other prompts: "),
    ):
        with pytest.raises(InvalidRequest, match=words):
            generated(other, tmp_path / "out", FakeEngine())
    assert (tmp_path / "out" / "answers" / "mod.jsonl").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="holds other files"):
        generated(plan, tmp_path / "notes", FakeEngine())
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("damage", "words"), [(b"no answer\n", "is damaged"), (None, "holds other answers")])
def test_a_file_that_was_changed_is_told(tiny_base: Path, tmp_path: Path, damage: bytes | None, words: str) -> None:
    plan = plan_of([method_of(tiny_base, "mod")])
    generated(plan, tmp_path / "out", FakeEngine())
    file = tmp_path / "out" / "answers" / "mod.jsonl"
    file.write_bytes(damage or b"".join(file.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(InvalidRequest, match=words):
        generated(plan, tmp_path / "out", FakeEngine())


def test_prompts_without_room_for_an_answer_are_counted(tiny_base: Path) -> None:
    """The tiny model has 256 positions, a byte each."""
    plan = plan_of([method_of(tiny_base, "base")], prompts=12)
    long = [prompt.model_copy(update={"prompt": "x" * 248}) for prompt in plan.prompts[:2]]
    fits = plan.prompts[0].model_copy(update={"prompt": "x" * 247})
    with pytest.raises(InvalidRequest, match=r"2 prompts would leave no room for 8 tokens of answer in the 256 of tiny.*prompt 1,"):
        prompt_ids(Plan("front", [fits, *long], plan.methods, plan.judges, 8))


def test_two_processes_do_not_share_a_folder(tiny_base: Path, tmp_path: Path) -> None:
    plan, home = plan_of([method_of(tiny_base, "base")]), EvaluationFolder(tmp_path / "out")
    home.prepare(plan)
    with home.claimed(), pytest.raises(Conflict, match="another process evaluates"), home.claimed():
        pass
