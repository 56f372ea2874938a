"""`sipo evaluate` from its options to its report, with an engine that answers by rote and the exact judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from services.common.contract.job_files import JobFiles
from services.common.contract.messages import PromptDecided
from services.common.contract.reports import Funnel, Report, RoundReport
from sipo.conversation import Prompt
from sipo.evaluation.ground_truth import concise
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.reward_models import RewardFunction, open_reward_model
from sipo.preferences import Example
from sipo.training.run_folder import HISTORY
from sipo.training.settings import Measure, TrainMetrics
from tests.evaluation import OBJECTIVES, FakeEngine
from tests.trainer import write_adapter

pytestmark = pytest.mark.slow

Evaluate = Callable[..., Result]
BUNDLED = Path(__file__).parents[2] / "sipo/data/bundled/train.jsonl"
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


def test_seeds_unseen_weights_and_all_that_a_report_can_show(
    evaluate: Evaluate, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a judge whose rewards mean nothing by themselves, which filtered the job's candidates."""
    monkeypatch.setattr("sipo.evaluation.judging.open_reward_model", _open_reward_model)
    Path("more.txt").write_text("Who?\nHow many, and of what?\nWhy not?\n")
    _write_job(Path("job"))
    methods = ["base", "a@1=mod:./adapters", "a@2=mod:./adapters", "b=soup:./adapters"]
    options = (
        *("--weights", "3", "--unseen", "2", "--also", "loud=http://loud/score", "--standardise-on", "more.txt"),
        *("--data", str(BUNDLED), "--job", "job/report.json", "--against", "a", "--kl"),
    )
    judges = ("--judge", "concise=python:concise", "--judge", "warm=http://host/score")
    monkeypatch.setenv("SIPO_REWARD_MODELS", json.dumps({"kind": "http://user:secret@host/score?key=secret"}))
    result = evaluate(*options, methods=[part for method in methods for part in ("--method", method)], judges=judges)
    assert result.exit_code == 0, result.output
    report = _report()
    assert [(one.method, one.against) for one in report.comparisons] == [
        *(("base", "a@1"), ("base", "a@2")),
        *(("b", "a@1"), ("b", "a@2")),
    ]
    assert [(one.method, one.against, one.seeds) for one in report.verdicts] == [("base", "a", ["1", "2"]), ("b", "a", ["1", "2"])]
    assert [(len(one.points), [point.weights["concise"] for point in one.unseen]) for one in report.methods[1:]] == [
        (3, [0.25, 0.75])
    ] * 3
    assert report.standardised_on == 3
    assert report.methods[0].points[0].rewards["warm"].value != 0  # of which the mean is that of the validation prompts
    assert (report.also, set(report.agreement)) == ({"loud": "http://loud/score"}, {"warm"})
    assert report.data[str(BUNDLED)].conflicting == 173  # of those that are trained on
    assert "secret" not in report.model_dump_json()
    assert (report.filtered, report.jobs[0].rounds[0].accepted) == ({"warm": "kind"}, 3)
    assert [(point.step, point.loss, point.validation) for point in report.jobs[0].trainings[0].curve] == [
        (1, 0.7, False),
        (2, 0.6, True),
    ]
    assert report.methods[1].points[1].divergence is not None
    assert report.methods[1].points[1].divergence.value > 0
    assert "warning: the judge of warm filtered the training pairs, as kind" in result.stderr
    assert "validation, answers of base: 3 of 3 prompts" in result.stderr
    assert "b against a (seeds 1, 2)" in result.stdout
    assert (Path("front/index.html").exists(), Path("front/validation/report.json").exists()) == (True, False)


def test_the_same_command_goes_on_and_another_one_is_refused(evaluate: Evaluate, engine: FakeEngine) -> None:
    methods = ["--method", "soup=soup:./adapters", "--method", "tuned=mod:./adapters"]
    engine.most = 1
    stopped = evaluate(methods=methods)
    assert stopped.exit_code != 0
    assert "stopped: the same command goes on with what is in" in stopped.stderr
    assert not Path("front/report.json").exists()
    engine.most = None
    assert evaluate(methods=methods).exit_code == 0
    assert engine.batches == [30, 20], "what a policy alone answers is known from the soups"
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
        (["--unseen", "concise=0,warm=1"], "the weights concise=0,warm=1 are not unseen"),
        (["--also", "loud=python:loud"], "the judge of loud (python:loud): no reward model 'loud'"),
        (["--standardise-on", "prompts.txt"], "every judge is a function"),
        (["--job", "prompts.txt"], "prompts.txt is no report of a job"),
        (["--job", "nowhere"], "there is no report nowhere"),
        (["--method", "a@1=soup:./adapters", "--method", "b@2=mod:./adapters"], "b and a have no seed in common"),
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


def _open_reward_model(address: str, **_: Any) -> RewardFunction:
    if address.startswith("python:"):
        return open_reward_model(address)
    return lambda prompt, responses: [float(len(str(prompt)) + len(response)) for response in responses]


def _write_job(folder: Path) -> None:
    """As the trainer leaves one."""
    measure = Measure(loss=0.7, margin=0.0, accuracy=0.5)
    counts = dict.fromkeys(
        ("pairs", "validation_pairs", "prompts_too_long", "identical", "responses_cut", "steps", "best_step", "micro_batch_size"), 1
    )
    metrics = TrainMetrics(objective="warm", held_out=True, seconds=1, dtype="float32", before=measure, after=measure, **counts)
    figures = Funnel(prompts=5, failed=0, candidates=40, rejected={"duplicate": 4}, accepted=3, pairs=6)
    round_ = RoundReport(
        round=1,
        sampling_set="demo:1",
        reward_set="demo:1",
        funnel=figures,
        ground_truth={},
        training={"warm": metrics},
        policy_set=None,
    )
    report = Report(
        job="job-1",
        policy="demo",
        objectives=OBJECTIVES,
        alignment={},
        rounds=[round_],
        policy_set=None,
        activated=False,
        reason=None,
    )
    files = JobFiles(folder)
    history = files.training_run(1, "warm") / HISTORY
    history.parent.mkdir(parents=True)
    history.write_text(
        '{"step": 1, "loss": 0.7}\n{"step": 2, "eval_loss": 0.6}\n{"step": 2, "train_runtime": 9}\n{"step": 2, "eval_loss": 0.5}\n'
    )
    files.report.write_text(report.model_dump_json())
    rewards = {"concise": 0.1, "warm": 0.2, "concise=0.5,warm=0.5": 0.3, "kind": 4.0}
    example = Example(prompt="Hi", response_0="a", response_1="b", labels={"warm": 1})
    decided = PromptDecided(job="job-1", round=1, prompt="0", outcome="none", example=example, rewards_0=rewards, rewards_1=rewards)
    files.decisions.write_text(decided.model_dump_json() + "\n")


def _report() -> EvaluationReport:
    return EvaluationReport.model_validate_json(Path("front/report.json").read_bytes())
