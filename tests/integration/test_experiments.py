"""`sipo experiment run` with a tiny model: real files and plans, with quick stand-ins for training processes, for the system that
runs a round, at its HTTP, and for `sipo evaluate`."""

from __future__ import annotations

import asyncio
import fcntl
import json
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.cli.client import Gateway
from gateway.cli.experiment.rounds import see_through
from gateway.cli.experiment.run import LOCK
from gateway.experiments.published import SeedResults
from gateway.experiments.summary import Summary
from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.reports import Funnel, Report, RoundReport
from sipo.evaluation.folder import REPORT
from sipo.evaluation.report import Comparison, EvaluationReport, Interval, MethodResult, Sample
from sipo.models import Base
from sipo.policies import JobRound, PolicyStore
from sipo.preferences import Example
from sipo.training.data import TrainingPair
from sipo.training.planning import Planner
from sipo.training.run_folder import RunFolder, read_any_run, read_run
from sipo.training.run_set import publish_runs
from tests.trainer import QUICK, decision, stand_in, write_adapter

ROUNDS, TRAINING, EVALUATION = (import_module(f"gateway.cli.experiment.{name}") for name in ("rounds", "training", "evaluation"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = {"lora_rank": 4, "lora_alpha": 8, "batch_size": 2, "epochs": 1}
EXPERIMENT = {
    "name": "tiny",
    "description": "a test",
    "data": "data.jsonl",
    "prompts": "prompts.txt",
    "objectives": ["concise", "warm"],
    "judges": {"concise": "python:concise", "warm": "python:warm"},
    "weights": 3,
    "seeds": [0, 1],
    "stages": [
        {"name": "half", "kind": "subset", "seed": "fixed", "conflict_ratio": 0.5, "size": 4},
        {"name": "sft", "kind": "sft", "seed": "fixed", "settings": SETTINGS},
        {"name": "align", "kind": "align", "reference": "sft", "data": "half", "settings": SETTINGS},
        {"name": "lw", "kind": "lw", "reference": "sft", "settings": SETTINGS},
        {"name": "modpo", "kind": "modpo", "start": "align", "settings": SETTINGS},
        {"name": "round", "kind": "round", "start": "align", "job": {"filter": {"reward_models": ["exact"]}}},
        {"name": "more", "kind": "more_training", "start": "align", "steps_of": "round"},
        {
            "name": "front",
            "kind": "evaluate",
            "methods": ["base", "mod=mod:align", "sipo=mod:round", "more=mod:more", "lw=models:lw", "modpo=models:modpo"],
            "against": ["mod"],
        },
    ],
}
EXPERIMENT["stages"][5]["reward_models"] = {"exact": "python:concise"}  # type: ignore[index]

pytestmark = pytest.mark.slow

Run = Callable[..., Result]


def job_of(state: JobState, **fields: Any) -> Job:
    return Job(id="job-1", spec=JobSpec(policy="experiment"), state=state, created=NOW, updated=NOW, **fields)


class FakeSystem:
    """Gateway and trainer of a round as its HTTP shows them: a job that is posted is completed at once, with a set published from
    the one that it names. `fails` ends it without; `posted` has the specifications, `processes` what was started last."""

    def __init__(self, tiny_base: Path, cache_dir: Path, adapter: Path) -> None:
        self.base = Base.open(str(tiny_base), cache_dir)
        self.adapter = adapter
        self.fails = False
        self.posted: list[dict[str, Any]] = []
        self.job: Job | None = None

    def start(self, specs: Any, data_dir: Path, **_: Any) -> Any:
        self.processes, self.data_dir, self.job = specs, data_dir, None
        (data_dir / "logs").mkdir(parents=True, exist_ok=True)
        return nullcontext(self)

    async def wait(self) -> None:
        await asyncio.Event().wait()

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            body = request.read().decode()
            spec = json.loads(body.partition('name="spec"')[2].partition("\r\n\r\n")[2].partition("\r\n--")[0])
            self.posted.append(spec)
            self.job = self.fail() if self.fails else self.complete(JobSpec.model_validate(spec))
            return httpx.Response(201, content=self.job.model_dump_json())
        if request.url.path == "/v1/jobs":
            return httpx.Response(200, json={"data": []})
        assert self.job is not None
        return httpx.Response(200, content=self.job.model_dump_json())

    def fail(self) -> Job:
        return job_of(JobState.FAILED, error="the scorer is full")

    def complete(self, spec: JobSpec) -> Job:
        store, files = PolicyStore(self.data_dir / "policies"), JobFiles(self.data_dir / "jobs" / "job-1")
        start = store.get(str(spec.sampling_set))
        pair = TrainingPair(prompt="q", chosen="yes", rejected="no")
        runs = {}
        for objective in start.objectives:
            planned = Planner(self.base, start).sipo(objective, [pair] * 5, QUICK.model_copy(update={"learning_rate": 3e-3}))
            runs[objective] = RunFolder(files.training_run(1, objective))
            runs[objective].prepare(planned.run, planned.pairs)
            train(self.adapter, runs[objective], steps=3)
        made_by = JobRound(job="job-1", round=1)
        published = publish_runs(store, spec.policy, runs, base=self.base, parent=start, made_by=made_by)
        files.decisions.write_text(decision("job-1", 0).model_dump_json() + "\n")
        funnel = Funnel(prompts=1, failed=0, candidates=1, rejected={}, accepted=1, pairs=2)
        report = RoundReport(
            round=1,
            sampling_set=start.id,
            reward_set=start.id,
            funnel=funnel,
            ground_truth={},
            training={},
            policy_set=published.id,
        )
        files.report.write_text(
            Report(
                job="job-1",
                policy=spec.policy,
                objectives=start.objectives,
                alignment={},
                rounds=[report],
                policy_set=published.id,
                activated=False,
                reason=None,
            ).model_dump_json()
        )
        return job_of(JobState.COMPLETED, policy_set=published.id)


def train(adapter: Path, folder: RunFolder, *, steps: int) -> None:
    asyncio.run(stand_in(adapter, [])(folder.run_file, hear))
    metrics = folder.finished()
    assert metrics is not None
    folder.finish(metrics.model_copy(update={"steps": steps}))


async def hear(_: Any) -> None:
    pass


def interval(value: float) -> Interval:
    return Interval(value=value, low=value - 0.1, high=value + 0.1)


def evaluated(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
    """In place of `sipo evaluate`."""
    folder = Path(command[command.index("--out") + 1])
    folder.mkdir(parents=True)
    methods = [command[index + 1] for index, option in enumerate(command) if option == "--method"]
    report = EvaluationReport(
        name="front",
        made=NOW,
        base="tiny",
        prompts=2,
        prompts_sha256="0" * 64,
        objectives=["concise", "warm"],
        judges={"concise": "python:concise", "warm": "python:warm"},
        reference_point={"concise": 0, "warm": 0},
        max_tokens=8,
        methods=[
            MethodResult(
                name=text.partition("=")[0],
                kind="mod",
                source=text,
                points=[],
                front=[],
                hypervolume=interval(0.5),
                igd_plus=interval(0),
                inner_product=None,
                spread={},
            )
            for text in methods
        ],
        comparisons=[Comparison(method="sipo", against="mod", difference=interval(0.2), p_value=0.01, uncorrected=0.001)],
        samples=[Sample(prompt="hello", answers=[])],
        seconds={"answers": 1.0},
        tokens={text.partition("=")[0]: 7 for text in methods},
    )
    (folder / REPORT).write_text(report.model_dump_json())
    (folder / "front.png").write_bytes(b"picture")
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def made() -> list[str]:
    """The training runs, as "runs/warm"."""
    return []


@pytest.fixture
def system(tiny_base: Path, tmp_path: Path, adapter: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> FakeSystem:
    system = FakeSystem(tiny_base, tmp_path / "cache", write_adapter(tmp_path / "improved"))
    quick, control = stand_in(adapter, made), stand_in(write_adapter(tmp_path / "control"), made)

    async def run_child(path: Path, tell: Any, command: Any) -> None:
        run = read_any_run(path)
        await (control if run.method == "sipo" else quick)(path, tell)
        if run.method == "sipo":  # as many steps as it was to have
            folder = RunFolder(path.parent)
            metrics = folder.finished()
            assert metrics is not None
            folder.finish(metrics.model_copy(update={"steps": 3}))

    monkeypatch.setattr(TRAINING, "run_child", run_child)
    monkeypatch.setattr(ROUNDS, "Supervisor", system.start)
    monkeypatch.setattr(EVALUATION.subprocess, "run", evaluated)
    monkeypatch.setattr("gateway.cli.client.httpx.Client", partial(httpx.Client, transport=httpx.MockTransport(system.answer)))
    return system


@pytest.fixture
def run(tiny_base: Path, data_dir: Path, tmp_path: Path, system: FakeSystem) -> Run:
    """`sipo experiment run`, or `command`, with further arguments, on EXPERIMENT with other fields."""
    responses = [("no", "yes " * (i + 1)) for i in range(6)]
    rows = [
        Example(prompt=f"q{i}", response_0=first, response_1=second, labels={"concise": i % 2, "warm": 1})
        for i, (first, second) in enumerate(responses)
    ]
    (tmp_path / "data.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    (tmp_path / "prompts.txt").write_text("hello\nwhat now\n")
    environment = {"SIPO_DATA_DIR": str(data_dir), "SIPO_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "250"}

    def run(command: str = "run", *arguments: str, **fields: Any) -> Result:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(EXPERIMENT | {"base": str(tiny_base)} | fields))
        return CliRunner().invoke(app, ["experiment", command, str(path), *arguments], env=environment)

    return run


def folder_of(data_dir: Path, name: str, seed: int) -> Path:
    [folder] = (data_dir / "experiments" / f"seed-{seed}").glob(f"{name}-*")
    return folder


def test_an_experiment_runs_from_the_fine_tuning_to_the_verdict(
    run: Run, system: FakeSystem, made: list[str], data_dir: Path, tmp_path: Path
) -> None:
    sitting = run("run", "--seed", "1")
    assert (sitting.exit_code, len(made)) == (0, 1 + 2 + 3 + 3 + 2), sitting.output
    assert "all of 8 steps are done" in sitting.output
    assert "sipo against mod (seed 1): wins, incomplete" in sitting.output
    rest = run()
    assert rest.exit_code == 0, rest.output
    assert "all of 14 steps are done" in rest.output
    assert "sipo against mod (seeds 0, 1): wins\n" in rest.output
    assert len(made) == 1 + 2 * (2 + 3 + 3 + 2), "a fine-tuning; policies, LW and MODPO at three weights, and more training, twice"

    tuned = next((data_dir / "experiments" / "all-seeds").glob("sft-*")) / "adapter"
    align, lw, more = (folder_of(data_dir, name, 1) for name in ("align", "lw", "more"))
    aligned = read_run(align / "runs" / "warm" / "run.yaml")
    assert (aligned.method, aligned.reference, aligned.settings.seed) == ("dpo", tuned, 1)
    assert len((align / "runs" / "warm" / "pairs.jsonl").read_text().splitlines()) == 4, "of the subset"
    assert [one["weights"]["concise"] for one in yaml.safe_load((lw / "models.yaml").read_text())] == [0, 0.5, 1]
    assert read_run(lw / "runs" / "1" / "lw" / "run.yaml").reference == tuned
    [spec] = [spec for spec in system.posted if spec["seed"] == 1]
    assert (spec["sampling_set"], spec["filter"]["reward_models"]) == ("experiment:1", ["exact"])
    assert {one.env["SIPO_REWARD_MODELS"] for one in system.processes} == {'{"exact": "python:concise"}'}
    control = read_run(more / "runs" / "warm" / "run.yaml")
    assert (control.method, control.settings.alpha, control.settings.learning_rate) == ("sipo", 0, 3e-3), "otherwise as the round's"
    assert control.settings.epochs == 1, "3 steps of 2 are the 6 rows once"
    published = PolicyStore(more / "data" / "policies").get("experiment")
    assert published.id == "experiment:1", "nobody asked to make the new one current"
    child = PolicyStore(more / "data" / "policies").get("experiment:2")
    assert (child.manifest.parent, child.manifest.reference) == ("experiment:1", published.manifest.reference)

    results = tmp_path / "results" / "tiny"
    summary = Summary.model_validate_json((results / "summary.json").read_text())
    front = summary.evaluations["front"]
    methods = ["base", "mod", "sipo", "more", "lw", "modpo"]
    assert [(one.method, one.seed) for one in front.hypervolumes] == [(name, seed) for seed in (0, 1) for name in methods]
    assert [(one.method, one.p_value) for one in front.comparisons] == [("sipo@0", 0.002), ("sipo@1", 0.002)]
    of_seed = SeedResults.model_validate_json((results / "seed-0" / "seed.json").read_bytes())
    steps = {step.stage: step for step in of_seed.steps}
    assert (steps["sft"].seed, steps["round"].tokens.generated, steps["front"].tokens.generated) == (None, 4, 7 * 6)
    assert steps["align"].tokens.trained > 0
    report = json.loads((results / "seed-0" / "front" / "report.json").read_text())
    assert report["samples"] == []
    assert (results / "seed-0" / "front" / "front.png").read_bytes() == b"picture"
    assert (results / "seed-0" / "sft" / "recipe.json").is_file()
    assert json.loads((results / "seed-1" / "round" / "report.json").read_text())["rounds"][0]["funnel"]["pairs"] == 2
    assert json.loads((results / "seed-1" / "round" / "round-1" / "warm" / "metrics.json").read_text())["steps"] == 3
    assert json.loads((results / "seed-1" / "align" / "warm" / "metrics.json").read_text())["objective"] == "warm"

    again = run()
    assert again.exit_code == 0
    assert len(made) == 21 and len(system.posted) == 2, "nothing is done twice"
    assert "yes" in run("show").output
    (results / "summary.json").unlink()
    assert "sipo against mod (seeds 0, 1): wins" in run("summary").output
    assert Summary.model_validate_json((results / "summary.json").read_text()) == summary


def test_seeds_and_summaries_that_there_are_not_are_refused(run: Run, made: list[str]) -> None:
    assert "tiny has no seed 5: its seeds are 0, 1" in run("run", "--seed", "5").output
    assert "no seed has results" in run("summary").output
    assert not made


def test_a_stage_that_fails_ends_the_run_and_the_same_command_goes_on_with_it(
    run: Run, system: FakeSystem, made: list[str]
) -> None:
    system.fails = True
    failed = run()
    assert failed.exit_code == 1
    assert "round, seed 0: job-1 failed, no policies were published: the scorer is full" in failed.output
    trained = len(made)
    system.fails = False
    assert run().exit_code == 0
    assert len(made) == 21 and trained == 1 + 2 + 3 + 3


def test_another_setting_keeps_what_does_not_build_on_it(run: Run, made: list[str], data_dir: Path) -> None:
    stages = [dict(one) for one in EXPERIMENT["stages"]]  # type: ignore[attr-defined]
    stages = [one for one in stages if one["name"] in ("half", "sft", "align", "lw")]
    assert run(seeds=[0], stages=stages).exit_code == 0
    before = made.copy()
    stages[3]["settings"] = SETTINGS | {"epochs": 2}
    assert run(seeds=[0], stages=stages).exit_code == 0
    assert made[len(before) :] == ["0/lw", "1/lw", "2/lw"]
    assert len(list((data_dir / "experiments" / "seed-0").glob("lw-*"))) == 2


def test_one_process_runs_an_experiment_at_a_time(run: Run, data_dir: Path) -> None:
    stages = EXPERIMENT["stages"][:1]  # type: ignore[index]
    assert run(stages=stages).exit_code == 0
    with (data_dir / "experiments" / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = run(stages=stages)
    assert second.exit_code == 1
    assert "another process runs an experiment in" in second.output


def test_a_job_that_was_posted_before_is_found_and_its_states_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = iter([JobState.GENERATING, JobState.TRAINING, JobState.COMPLETED])

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.method == "GET", "there is a job: none is posted"
        if request.url.path == "/v1/jobs":
            old = job_of(JobState.FAILED).model_copy(update={"id": "job-0"})
            jobs = [old, job_of(JobState.GENERATING)]
            return httpx.Response(200, json={"data": [job.model_dump(mode="json") for job in jobs]})
        assert request.url.path == "/v1/jobs/job-1"
        return httpx.Response(200, content=job_of(next(seen)).model_dump_json())

    monkeypatch.setattr("gateway.cli.client.httpx.Client", partial(httpx.Client, transport=httpx.MockTransport(answer)))
    job, states = see_through(Gateway("http://x"), JobSpec(policy="experiment"), tmp_path / "none", every=0.01)
    assert job.state == JobState.COMPLETED
    assert list(states) == ["generating", "training"]
