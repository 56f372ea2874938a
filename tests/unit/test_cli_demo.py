"""What the demo prepares and prints; tests/e2e runs the whole of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway.cli.demo import input as demo_input
from gateway.cli.demo.input import MAX_PROMPT_TOKENS, bundled_input, own_input
from gateway.cli.demo.results import show_fronts, show_report
from services.common.contract.job_files import JobFiles
from services.common.contract.reports import (
    AcceptedAccount,
    BestAvailable,
    CandidatesAccount,
    Funnel,
    GroundTruth,
    ImplicitOrder,
    Report,
    RoundEvaluation,
    RoundReport,
    StageAccount,
)
from services.common.settings import CommonSettings
from sipo.datasets import bundled_examples, bundled_on_policy_examples
from sipo.errors import InvalidData, InvalidRequest
from sipo.evaluation.report import Interval
from sipo.policies import PolicyStore
from sipo.prompts import PromptFormat
from sipo.training.settings import Measure, TrainMetrics
from tests.fakes import write_policy_set

CONFLICTING = {"a": 0, "b": 1}

METRICS = TrainMetrics(
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
ROUND = RoundReport(
    round=1,
    sampling_set="demo:1",
    reward_set="demo:1",
    funnel=Funnel(prompts=16, failed=1, candidates=120, rejected={"worse_than_original": 90}, accepted=5, pairs=10),
    ground_truth={"a": GroundTruth(response_0=0.11, response_1=0.22, accepted=0.77)},
    candidates=CandidatesAccount(
        stages={
            "sample": StageAccount(candidates=80, truncated=54, truly_better=1, ground_truth={"a": 0.25, "b": 0.125}),
            "rewrite": StageAccount(candidates=40, truncated=14, truly_better=3, ground_truth={"a": 0.5, "b": 0.375}),
        },
        accepted=AcceptedAccount(responses=5, truly_better=2, gain={"a": -0.12, "b": 0.07}),
        best_available=BestAvailable(prompts=4, gain={"a": 0.15, "b": 0.28}),
        implicit_order={"a": ImplicitOrder(comparisons=200, right=132), "b": ImplicitOrder(comparisons=0, right=0)},
    ),
    training={"a": METRICS},
    policy_set="demo:2",
)
REPORT = Report(
    job="job-1",
    policy="demo",
    objectives=["a", "b"],
    alignment={},
    rounds=[ROUND],
    policy_set="demo:2",
    activated=True,
    reason=None,
)


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


def test_the_bundled_round_trains_and_evaluates_on_prompts_that_the_shipped_policies_have_not_seen(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_policy_set(data_dir / "policies", "demo:1", ["concise", "warm"])
    shipped = PolicyStore(data_dir / "policies").get("demo:1")
    monkeypatch.setattr(demo_input, "publish_shipped", lambda _: shipped)
    source = bundled_input(CommonSettings(data_dir=data_dir))
    trained = {example.prompt for example in [*bundled_examples("train"), *bundled_on_policy_examples("train")]}
    prompts = [example.prompt for example in [*source.examples, *source.held_out]]
    assert len(set(prompts)) == len(prompts) == 40 + 64
    assert not trained.intersection(prompts)
    assert all(example.conflicting(source.objectives) for example in source.examples)
    assert (source.round_prompts, source.spec.max_prompts) == (40, 40)
    assert source.spec.evaluation is not None
    assert source.spec.evaluation.judges == {"concise": "python:concise", "warm": "python:warm"}


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
    show_report(REPORT)
    printed = capsys.readouterr().out
    words = ("120 for 16 prompts", "worse than original: 90", "5 of 16", "10 pairs")
    for figure in (*words, "0.110", "0.220", "0.770", "0.693", "0.512"):
        assert figure in printed
    assert "cut 5 responses" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["sample", "80", "67.5%", "1.2%", "0.250", "0.125"] in rows
    assert ["rewrite", "40", "35.0%", "7.5%", "0.500", "0.375"] in rows
    text = " ".join(printed.split())
    gain = "on average against the better original"
    assert f"truly better: 2 of 5 accepted responses; {gain}: a -0.120, b +0.070" in text
    assert f"best available: 4 of 16 prompts had a truly better response that is whole; {gain}: a +0.150, b +0.280" in text
    assert "implicit reward for a: right in 132 of 200 comparisons with originals (66%)" in text
    assert "implicit reward for b" not in text
    assert "no evidence" not in text
    assert "demo:2 published, made from demo:1" in printed
    assert "demo:2 activated" in printed
    assert "first alignment" not in printed and "round 1" not in printed

    none = Funnel(prompts=11, failed=0, candidates=80, rejected={}, accepted=0, pairs=0)
    nothing: dict[str, Any] = {"funnel": none, "candidates": None, "training": {}, "policy_set": None}
    second = ROUND.model_copy(update={"round": 2, "sampling_set": "demo:2", **nothing})
    show_report(REPORT.model_copy(update={"rounds": [ROUND, second], "reason": "round 2 gave nothing"}))
    printed = capsys.readouterr().out
    assert "round 1: candidates made: 120 for 16" in printed and "round 2: candidates made: 80 for 11" in printed
    assert "round 2 gave nothing" in printed


def test_the_fronts_before_and_after_are_printed_with_where_their_picture_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(evaluation: RoundEvaluation | None) -> str:
        show_fronts(REPORT.model_copy(update={"rounds": [ROUND.model_copy(update={"evaluation": evaluation})]}), JobFiles(tmp_path))
        return capsys.readouterr().out

    assert evaluated(None) == ""
    failed = RoundEvaluation(prompts=48, error="it ran out of memory")
    assert "the fronts were not measured: it ran out of memory" in evaluated(failed)
    found = RoundEvaluation(
        prompts=48,
        hypervolume={"before": Interval(value=0.25, low=0.2, high=0.3), "after": Interval(value=0.5, low=0.4, high=0.6)},
        difference=Interval(value=0.25, low=0.125, high=0.375),
        p_value=0.002,
    )
    lines = evaluated(found).splitlines()
    assert lines[1:5] == [
        "fronts: demo:1 and demo:2 on 48 prompts that nothing was trained on:",
        "  hypervolume before: 0.250 (0.200 to 0.300)",
        "  hypervolume after: 0.500 (0.400 to 0.600)",
        "  difference: +0.250 (+0.125 to +0.375), p 0.0020",
    ]
    assert lines[5:] == [f"  picture: {tmp_path}/evaluation-1/front/front.png", f"  page:    {tmp_path}/report.html"]


def test_where_nothing_was_held_out_or_has_a_ground_truth_the_report_says_no_more_than_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unknown = CandidatesAccount(
        stages={"distilled": StageAccount(candidates=8, truncated=2, truly_better=None, ground_truth={})},
        accepted=AcceptedAccount(responses=3, truly_better=None, gain={}),
        best_available=None,
        implicit_order={},
    )
    on_trained_pairs = METRICS.model_copy(update={"held_out": False})
    round_ = ROUND.model_copy(update={"candidates": unknown, "training": {"a": on_trained_pairs, "b": METRICS}})
    show_report(REPORT.model_copy(update={"rounds": [round_]}))
    printed = capsys.readouterr().out
    assert ["distilled", "8", "25.0%"] in [line.split() for line in printed.splitlines()]
    assert "truly better" not in printed and "best available" not in printed and "implicit reward" not in printed
    assert "a: too few pairs to hold some out, so loss and accuracy are those of the very pairs that were trained on" in " ".join(
        printed.split()
    )
