"""`sipo evaluate` from its options to its report, with an engine that answers by rote and the exact judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.conversation import Prompt
from sipo.evaluation.ground_truth import concise
from sipo.evaluation.report import EvaluationReport
from tests.evaluation import OBJECTIVES, FakeEngine
from tests.trainer import write_adapter

pytestmark = pytest.mark.slow

Evaluate = Callable[..., Result]
METHODS = ("--method", "base", "--method", "mod=mod:./adapters", "--method", "soup=soup:./adapters")
JUDGES = ("--judge", "concise=python:concise", "--judge", "warm=python:warm")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """In place of vLLM's."""
    engine = FakeEngine()
    monkeypatch.setattr("sipo.decoding.OfflineDecoder", engine.open)
    return engine


@pytest.fixture
def evaluate(engine: FakeEngine, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Runs the command in tmp_path, where there are adapters/ and 5 prompts."""
    monkeypatch.chdir(tmp_path)
    Path("adapters").mkdir()
    for objective in OBJECTIVES:
        write_adapter(tmp_path / "adapters" / objective)
    Path("prompts.txt").write_text("".join(f"What is {index}?\n" for index in range(5)))
    env = {"SIPO_DATA_DIR": "data", "SIPO_CACHE_DIR": "cache", "SIPO_MODEL": str(tiny_base), "COLUMNS": "200"}

    def evaluate(*args: str, methods: Sequence[str] = METHODS, judges: Sequence[str] = JUDGES) -> Result:
        options = ["prompts.txt", "--out", "front", "--max-tokens", "8", *methods, *judges, *args]
        return CliRunner().invoke(app, ["evaluate", *options], env=env)

    return evaluate


def test_a_report_compares_all_methods_and_says_what_answers_are_worth(evaluate: Evaluate, engine: FakeEngine) -> None:
    result = evaluate()
    assert result.exit_code == 0, result.output
    report = EvaluationReport.model_validate_json(Path("front/report.json").read_bytes())
    assert [(method.name, method.kind, len(method.points)) for method in report.methods] == [
        ("base", "base", 1),
        ("mod", "mod", 6),
        ("soup", "soup", 6),
    ]
    answers = [json.loads(line) for line in Path("front/answers/soup.jsonl").read_text().splitlines()]
    third = [concise(f"What is {answer['prompt']}?", answer["text"]) for answer in answers[2::6]]
    assert report.methods[2].points[2].rewards["concise"].value == pytest.approx(sum(third) / 5)
    assert [(one.method, one.against) for one in report.comparisons] == [("mod", "base"), ("soup", "base"), ("soup", "mod")]
    assert (report.name, report.prompts, report.max_tokens) == ("front", 5, 8)
    assert len(engine.started) == 1
    assert "concise=0.4,warm=0.6" in result.stdout
    assert "hypervolume" in result.stdout
    assert "answers of soup: 5 of 5 prompts" in result.stderr
    assert Path("front/index.html").is_file()


def test_the_same_command_goes_on_and_another_one_is_refused(evaluate: Evaluate, engine: FakeEngine) -> None:
    methods = ["--method", "soup=soup:./adapters", "--method", "tuned=mod:./adapters"]
    engine.most = 1
    stopped = evaluate(methods=methods)
    assert stopped.exit_code != 0
    assert "stopped: the same command goes on with what is in" in stopped.stderr
    assert not Path("front/report.json").exists()
    engine.most = None
    assert evaluate(methods=methods).exit_code == 0
    assert engine.batches == [30, 30]
    first = Path("front/report.json").read_text()

    again = evaluate("--against", "soup", methods=methods)
    assert (again.exit_code, len(engine.batches)) == (0, 2)
    for changed in (["--weights", "3"], ["--max-tokens", "9"], ["--max-prompts", "4"]):
        result = evaluate(*changed, methods=methods)
        assert result.exit_code == 2
        assert "front was begun with other" in result.stderr
        assert result.stderr.count("\n") == 1
    assert EvaluationReport.model_validate_json(first).methods == _report().methods


def test_a_judge_that_gives_no_number_ends_it_without_a_report(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(prompt: Prompt, responses: Sequence[str]) -> list[float]:
        return [float("nan") for _ in responses]

    with monkeypatch.context() as patch:
        patch.setattr("sipo.evaluation.judging.open_reward_model", lambda *_, **__: broken)
        result = evaluate(methods=["--method", "base"])
    assert result.exit_code == 1
    assert "error: the judge of concise (python:concise), on the answers of base to prompt 0, counted from 0: " in result.stderr
    assert sorted(path.name for path in Path("front").iterdir()) == [
        "answers",
        "plan.json",
        "prompts.jsonl",
        "scores",
        "seconds.json",
    ]
    assert evaluate(methods=["--method", "base"]).exit_code == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--against", "nobody"], "there is no method 'nobody' to compare with: there are base"),
        (["--weights", "concise=1"], "no weight for 'warm'"),
        (["--not-in", "prompts.txt"], "5 of 5 test prompts are in the training data prompts.txt"),
        (["--not-in", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--max-tokens", "250"], "5 prompts would leave no room for 250 tokens"),
        (["--method", "other=mod:nobody"], "no current policy set named 'nobody'"),
        (["--judge", "loud=python:loud"], "the judge of loud (python:loud): no reward model 'loud'"),
        (["--judge", "loud=http://host/score", "--method", "a=soup:./adapters"], "there is no folder adapters/loud"),
    ],
)
def test_wrong_options_get_one_sentence_and_no_folder(evaluate: Evaluate, args: list[str], words: str) -> None:
    result = evaluate(*args, methods=["--method", "base"])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("front").exists()


def _report() -> EvaluationReport:
    return EvaluationReport.model_validate_json(Path("front/report.json").read_bytes())
