"""What the demo prepares and prints; tests/e2e runs the whole of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway.cli.demo.input import MAX_PROMPT_TOKENS, own_input
from gateway.cli.demo.results import show_report
from services.common.contract.reports import Funnel, GroundTruth, Report, RoundReport
from services.common.settings import CommonSettings
from sipo.errors import InvalidData, InvalidRequest
from sipo.policies import PolicyStore
from sipo.prompts import PromptFormat
from sipo.training.settings import Measure, TrainMetrics
from tests.fakes import write_policy_set

CONFLICTING = {"a": 0, "b": 1}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    example = {"response_0": "x", "response_1": "y", "labels": CONFLICTING}
    path.write_text("".join(json.dumps({"prompt": f"{i}?", **example, **row}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture
def settings(data_dir: Path, tiny_base: Path) -> CommonSettings:
    return CommonSettings(data_dir=data_dir, model=str(tiny_base))


def test_held_out_rows_are_left_out_and_long_prompts_cut_and_both_are_counted(
    settings: CommonSettings, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, agreeing = {"prompt": "Begin" + "x" * MAX_PROMPT_TOKENS + "end?"}, {"labels": {"a": 1, "b": 1}}
    rows = [{"split": "train"}, {"split": "test"}, {"split": "validation"}, long, agreeing]
    source = own_input(settings, write(tmp_path / "My Data.jsonl", *rows), None, max_pairs=7)
    prompts = [example.prompt for example in source.examples]
    assert (prompts[0], prompts[2]) == ("0?", "4?")
    assert prompts[1].startswith("Begin")
    assert prompts[1].endswith("end?")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokens = len(PromptFormat.of(tokenizer).prompt_ids(prompts[1], tokenizer))
    assert MAX_PROMPT_TOKENS - 10 < tokens <= MAX_PROMPT_TOKENS
    assert (source.offered, source.conflicting, source.objectives) == (3, 2, ["a", "b"])
    assert source.spec.policy.startswith("demo-my-data-")
    assert (source.spec.alignment.max_pairs, source.spec.max_prompts, source.spec.activate) == (7, 16, True)
    printed = capsys.readouterr()
    assert "rows whose `split` holds them out of training (2)" in printed.err
    assert "cut in the middle: 1 prompt of more than 256 tokens" in printed.out


def test_a_second_run_starts_from_the_policies_that_the_first_one_aligned(settings: CommonSettings, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {}, {})
    name = own_input(settings, path, None, max_pairs=7).spec.policy
    assert own_input(settings, path, None, max_pairs=8).spec.policy != name
    write_policy_set(settings.data_dir / "policies", f"{name}:1", ["a", "b"])
    assert own_input(settings, path, None, max_pairs=7).spec.policy == name
    current = PolicyStore(settings.data_dir / "policies").current(name)
    assert current is not None
    assert current.id == f"{name}:1"


def test_data_that_cannot_make_a_round_is_refused(settings: CommonSettings, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"a job of 3 objectives .* needs a decoder with SIPO_DECODER_SLOTS=3"):
        own_input(settings, write(tmp_path / "three.jsonl", {"labels": {"a": 1, "b": 0, "c": 0}}), None, max_pairs=7)
    with pytest.raises(InvalidRequest, match="none of the 1 row of"):
        own_input(settings, write(tmp_path / "agreeing.jsonl", {"labels": {"a": 1, "b": 1}}), None, max_pairs=7)
    with pytest.raises(InvalidData, match="line 2"):
        own_input(settings, write(tmp_path / "bad.jsonl", {}, {"prompt": ""}), None, max_pairs=7)


def test_the_report_is_printed_with_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = TrainMetrics(
        objective="a",
        pairs=31,
        validation_pairs=3,
        held_out=True,
        prompts_too_long=2,
        identical=0,
        responses_cut=5,
        steps=4,
        best_step=4,
        micro_batch_size=1,
        seconds=12.3,
        dtype="float32",
        before=Measure(loss=0.693, margin=0, accuracy=0.5),
        after=Measure(loss=0.512, margin=0.4, accuracy=0.9),
    )
    first = RoundReport(
        round=1,
        sampling_set="demo:1",
        reward_set="demo:1",
        funnel=Funnel(prompts=16, failed=1, candidates=120, rejected={"worse_than_original": 90}, accepted=5, pairs=10),
        ground_truth={"a": GroundTruth(response_0=0.11, response_1=0.22, accepted=0.77)},
        training={"a": metrics},
        policy_set="demo:2",
    )
    report = Report(
        job="job-1",
        policy="demo",
        objectives=["a", "b"],
        alignment={},
        rounds=[first],
        policy_set="demo:2",
        activated=True,
        reason=None,
    )
    show_report(report)
    printed = capsys.readouterr().out
    words = ("120 for 16 prompts", "worse than original: 90", "5 of 16", "10 pairs")
    for figure in (*words, "0.110", "0.220", "0.770", "0.693", "0.512"):
        assert figure in printed
    assert "cut 5 responses" in printed
    assert "demo:2 published, made from demo:1" in printed
    assert "demo:2 activated" in printed
    assert "first alignment" not in printed and "round 1" not in printed

    none = Funnel(prompts=11, failed=0, candidates=80, rejected={}, accepted=0, pairs=0)
    second = first.model_copy(update={"round": 2, "sampling_set": "demo:2", "funnel": none, "training": {}, "policy_set": None})
    show_report(report.model_copy(update={"rounds": [first, second], "reason": "round 2 gave nothing"}))
    printed = capsys.readouterr().out
    assert "round 1: candidates made: 120 for 16" in printed and "round 2: candidates made: 80 for 11" in printed
    assert "round 2 gave nothing" in printed
