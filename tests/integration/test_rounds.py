"""Jobs of several rounds: the real feeder, trainer and queue server; sampling, scoring and mostly training are quick stand-ins."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from redis.asyncio import Redis
from safetensors.torch import load_file

from gateway.jobs.feeder import Feeder, read_prompts
from services.common.background import end_tasks
from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobState
from services.common.contract.keys import DECISIONS, PROMPTS
from services.common.contract.messages import PromptDecided, PromptQueued
from services.common.local.processes import free_ports
from services.common.local.training import run_child
from services.common.queue import Consumer, Queue
from services.trainer import lifecycle
from services.trainer.app import open_stages
from services.trainer.decisions import DecisionLog
from services.trainer.lifecycle import Lifecycle
from services.trainer.rounds import Stages
from services.trainer.settings import TrainerSettings
from sipo.errors import TrainingFailed
from sipo.policies import PolicyStore, adapter_sha256
from sipo.training.run_folder import SftFolder, read_any_run, read_run
from sipo.training.settings import Progress, SftRun, TrainMetrics, TrainSettings
from support import PATIENCE
from tests.trainer import OBJECTIVES, TUNED, Tell, decision, policies, report_of, submit, trainer, until

pytestmark = pytest.mark.slow

THREE = [*OBJECTIVES, "kind"]

Accepts = Callable[[int, int], bool]


def one_more_each(round_: int, row: int) -> bool:
    """Round 1 resolves row 0, round 2 row 1, round 3 row 2."""
    return row < round_


def first_round_only(round_: int, row: int) -> bool:
    return (round_, row) == (1, 0)


@asynccontextmanager
async def fed(redis: Redis, stages: Stages, accepts: Accepts, feeders: int = 1) -> AsyncIterator[list[PromptQueued]]:
    """Feeders, and a stand-in for worker and scorer that decides prompts by round and row; lists what was fed."""
    prompts: list[PromptQueued] = []

    async def decide() -> None:
        while True:
            for entry, fields in await redis.xrange(PROMPTS):
                prompts.append(prompt := PromptQueued.model_validate_json(fields["data"]))
                row, round_ = int(prompt.prompt), prompt.round
                await Queue(redis).put(DECISIONS, decision(prompt.job, row, round_=round_, accepted=accepts(round_, row)))
                await redis.xdel(PROMPTS, entry)
            await asyncio.sleep(0.01)

    ours = [Feeder(Queue(redis), JobStore(redis), stages.jobs_dir, pause=0.01) for _ in range(feeders)]
    tasks = [asyncio.create_task(work) for work in (decide(), *(feeder.run() for feeder in ours))]
    try:
        yield prompts
    finally:
        await end_tasks(*tasks)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "JOBS_POLL_SECONDS", 0.02)


async def test_each_round_samples_from_the_set_before_what_is_unresolved_and_trains_on_its_own_pairs(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path
) -> None:
    policies(stages, adapter, THREE)
    current: list[str] = []

    def accepts(round_: int, row: int) -> bool:
        current.append(stages.store.get("demo").id)
        return one_more_each(round_, row)

    job = await submit(redis, stages, objectives=THREE, total=None, rounds=3, activate=True)
    async with fed(redis, stages, accepts) as prompts, trainer(redis, stages):
        done = await until(redis, job, JobState.COMPLETED)
    plans = [(one.round, one.prompt, one.plan.sampling_set, one.plan.reward_set) for one in prompts]
    assert plans == [
        *((1, row, "demo:1", "demo:1") for row in "012"),
        *((2, row, "demo:2", "demo:1") for row in "12"),
        (3, "2", "demo:3", "demo:1"),
    ]
    assert set(current) == {"demo:1"} and stages.store.get("demo").id == "demo:4", "only the last set is activated"
    manifests = [one.manifest for one in stages.store.sets()]
    assert [(one.round, one.parent) for one in manifests] == [(0, None), (1, "demo:1"), (2, "demo:2"), (3, "demo:3")]
    assert runs == [f"round-{k}/{objective}" for k in (1, 2, 3) for objective in THREE]
    for k, objective in ((k, objective) for k in (1, 2, 3) for objective in THREE):
        folder = stages.files(job).training_run(k, objective)
        assert read_run(folder / "run.yaml").start == stages.store.get(f"demo:{k}").adapter_dir(objective)
        assert {json.loads(line)["prompt"] for line in (folder / "pairs.jsonl").read_text().splitlines()} == {f"q{k - 1}"}

    assert (done.round, done.total, done.policy_set, done.reason) == (3, 1, "demo:4", None)
    assert (done.counts.queued, done.counts.decided, done.counts.accepted) == (1, 1, 1)
    report = report_of(stages, job)
    funnels = [(one.round, one.sampling_set, one.funnel.prompts, one.funnel.pairs, one.policy_set) for one in report.rounds]
    assert funnels == [(1, "demo:1", 3, 2, "demo:2"), (2, "demo:2", 2, 2, "demo:3"), (3, "demo:3", 1, 2, "demo:4")]
    assert all(one.training.keys() == set(THREE) for one in report.rounds)
    assert (report.policy_set, report.activated, report.reason) == ("demo:4", True, None)


@pytest.mark.parametrize(("reward_set", "rewards"), [("first", ["demo:1", "demo:1"]), ("latest", ["demo:2", "demo:4"])])
async def test_a_job_may_name_the_set_it_starts_from_and_run_all_prompts_again(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path, reward_set: str, rewards: list[str]
) -> None:
    for round_, parent in ((0, None), (1, "demo:1"), (2, "demo:2")):
        policies(stages, adapter, round=round_, parent=parent)
    job = await submit(redis, stages, total=None, sampling_set="demo:2", rounds=2, round_prompts="all", reward_set=reward_set)
    async with fed(redis, stages, lambda *_: True) as prompts, trainer(redis, stages):
        await until(redis, job, JobState.COMPLETED)
    plans = [(one.round, one.prompt, one.plan.sampling_set, one.plan.reward_set) for one in prompts]
    assert plans == [(k, row, f"demo:{2 * k}", rewards[k - 1]) for k in (1, 2) for row in "012"]
    assert [one.manifest.parent for one in stages.store.sets()][3:] == ["demo:2", "demo:4"]
    assert [one.reward_set for one in report_of(stages, job).rounds] == rewards
    assert stages.store.get("demo").id == "demo:3", "the job did not ask for activation"


async def test_a_job_ends_early_when_no_prompt_is_left(redis: Redis, stages: Stages, runs: list[str], adapter: Path) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages, total=None, rounds=3, activate=True)
    async with fed(redis, stages, lambda *_: True) as prompts, trainer(redis, stages):
        done = await until(redis, job, JobState.COMPLETED)
    assert len(prompts) == 3 and (done.round, done.policy_set, done.error) == (1, "demo:2", None)
    assert done.reason == report_of(stages, job).reason == "round 1 of 3 left no prompt without an accepted response"
    assert stages.store.get("demo").id == "demo:2"


@pytest.mark.parametrize("activate", [True, False])
async def test_a_later_round_without_pairs_ends_the_job_with_what_the_rounds_before_published(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path, activate: bool
) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages, total=None, rounds=3, activate=activate)
    async with fed(redis, stages, first_round_only), trainer(redis, stages):
        done = await until(redis, job, JobState.COMPLETED)
    assert (done.round, done.policy_set, done.error) == (2, "demo:2", None)
    assert done.reason is not None and done.reason.startswith(
        "round 2 of 3 gave nothing to train on: no response passed the filter for concise, warm, in 2 prompts with 2 candidates"
    )
    report = report_of(stages, job)
    assert (report.policy_set, report.activated, report.reason) == ("demo:2", activate, done.reason)
    assert [(one.funnel.accepted, one.policy_set) for one in report.rounds] == [(1, "demo:2"), (0, None)]
    assert stages.store.get("demo").id == ("demo:2" if activate else "demo:1")


async def test_a_later_round_that_fails_leaves_the_sets_before_it_and_activates_none(
    redis: Redis, stages: Stages, adapter: Path
) -> None:
    quick = stages.run_training

    async def fail_in_the_second(path: Path, tell: Tell) -> TrainMetrics:
        if path.parent.parent.name == "round-2":
            raise TrainingFailed("it diverged")
        return await quick(path, tell)

    stages = replace(stages, run_training=fail_in_the_second)
    policies(stages, adapter)
    job = await submit(redis, stages, total=None, rounds=2, activate=True)
    async with fed(redis, stages, one_more_each), trainer(redis, stages):
        failed = await until(redis, job, JobState.FAILED)
    assert (failed.error, failed.policy_set) == ("it diverged", "demo:2")
    assert stages.store.get("demo").id == "demo:1"


async def test_several_feeders_feed_each_prompt_of_each_round_once(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path
) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages, total=None, rounds=3)
    async with fed(redis, stages, one_more_each, feeders=3) as prompts, trainer(redis, stages):
        await until(redis, job, JobState.COMPLETED)
    assert [one.id.removeprefix(f"{job.id}/") for one in prompts] == ["1/0", "1/1", "1/2", "2/1", "2/2", "3/2"]


async def test_a_rounds_rows_are_the_same_whatever_is_decided_in_it_meanwhile(redis: Redis, stages: Stages) -> None:
    job = await submit(redis, stages, rounds=3)
    files = stages.files(job)

    def rows(round_: int) -> list[int]:
        return [row for row, _ in read_prompts(files, job.model_copy(update={"round": round_}))]

    assert rows(1) == [0, 1, 2]
    log = DecisionLog(files.folder)
    log.append([decision(job.id, 0), decision(job.id, 1, accepted=False), decision(job.id, 2, accepted=False)])
    assert (rows(1), rows(2)) == ([0, 1, 2], [1, 2])
    log.append([decision(job.id, 2, round_=2)])
    with log.path.open("a") as file:  # the trainer writes the next one
        file.write(decision(job.id, 1, round_=2).model_dump_json()[:-1])
    assert (rows(1), rows(2), rows(3)) == ([0, 1, 2], [1, 2], [1])


async def test_a_fine_tuning_is_the_reference_of_the_first_policies_and_of_all_rounds_after(
    redis: Redis, stages: Stages, runs: list[str]
) -> None:
    job = await submit(redis, stages, total=None, rounds=2, sft=TrainSettings(lora_rank=3, epochs=4))
    async with fed(redis, stages, one_more_each), trainer(redis, stages):
        done = await until(redis, job, JobState.COMPLETED)
    assert done.policy_set == "demo:3"
    assert runs == ["round-0/_sft", *(f"round-{k}/{objective}" for k in range(3) for objective in OBJECTIVES)]
    files = stages.files(job)
    tuned = read_any_run(files.fine_tuning / "run.yaml")
    assert isinstance(tuned, SftRun) and (tuned.settings.lora_rank, tuned.settings.epochs) == (3, 4)
    assert [row.responses for row in SftFolder(files.fine_tuning).answers()] == [[f"a{row}", f"b{row}"] for row in range(3)]
    sets = stages.store.sets()
    assert {one.manifest.reference.sha256 for one in sets if one.manifest.reference} == {
        adapter_sha256(files.fine_tuning / "adapter")
    }
    for k, reference in enumerate([files.fine_tuning / "adapter", *(one.reference_dir for one in sets[:2])]):
        run = read_run(files.training_run(k, "warm") / "run.yaml")
        assert (run.reference, run.reference_sha256) == (
            reference,
            sets[0].manifest.reference and sets[0].manifest.reference.sha256,
        )
    assert report_of(stages, job).sft == TUNED
    assert "fine-tuning" in files.page.read_text()


async def test_a_fine_tuning_of_a_job_runs_in_a_process_of_its_own(redis: Redis, stages: Stages, runs: list[str]) -> None:
    quick = stages.run_training

    async def run_training(path: Path, tell: Tell) -> None:
        await (run_child if path.parent.name == "_sft" else quick)(path, tell)

    stages = replace(stages, run_training=run_training)
    settings = TrainSettings(lora_rank=4, batch_size=2, micro_batch_size=2, epochs=4, learning_rate=1e-2)
    job = await submit(redis, stages, total=None, sft=settings)
    told: list[tuple[str, int]] = []

    async def tell(progress: Progress) -> None:
        told.append((progress.objective, progress.step))

    published = await stages.align(job, tell)
    assert told == [*(("sft", step) for step in range(1, 13)), *((objective, 1) for objective in OBJECTIVES)]
    metrics = SftFolder(stages.files(job).fine_tuning).finished()
    assert metrics is not None and metrics.loss_after < metrics.loss_before
    assert published.reference_dir is not None
    assert {path.name for path in published.reference_dir.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "loss.png",
    }


class Killer:
    """Ends the trainer right after each step that has an effect, the first time that this step is done."""

    def __init__(self) -> None:
        self.deaths: set[str] = set()
        self.dead = asyncio.Event()
        self.buried = threading.Event()
        self._loop = asyncio.get_running_loop()

    def patch(self, patch: pytest.MonkeyPatch, owner: Any, name: str, label: Callable[..., str]) -> None:
        patch.setattr(owner, name, self.after(getattr(owner, name), name, label))

    def after(self, step: Callable[..., Any], name: str, label: Callable[..., str]) -> Callable[..., Any]:
        async def in_task(*args: Any, **kwargs: Any) -> Any:
            result = await step(*args, **kwargs)
            if self._dies(f"{name} {label(*args)}"):
                await asyncio.Event().wait()
            return result

        def in_thread(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self._dies(f"{name} {label(*args)}"):
                self.buried.wait(30)
            return result

        return in_task if asyncio.iscoroutinefunction(step) else in_thread

    def _dies(self, step: str) -> bool:
        if step in self.deaths:
            return False
        self.deaths.add(step)
        self._loop.call_soon_threadsafe(self.dead.set)
        return True


@pytest.mark.slow
async def test_a_trainer_killed_after_any_step_of_any_round_goes_on(
    redis: Redis, stages: Stages, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer()
    killer.patch(monkeypatch, Lifecycle, "_advance", lambda _, job, to: f"{job.round} to {to}")
    killer.patch(monkeypatch, Stages, "publish", lambda _, job: job.round)
    killer.patch(monkeypatch, Stages, "report", lambda _, job, *__: f"{job.round} {job.state}")
    killer.patch(monkeypatch, DecisionLog, "append", lambda _, decisions: [one.id for one in decisions])
    killer.patch(monkeypatch, PolicyStore, "activate", lambda _, reference: reference)
    run_training = killer.after(
        stages.run_training, "run_training", lambda path, _: f"{path.parent.parent.name} {path.parent.name}"
    )
    stages = replace(stages, run_training=run_training)

    async def live() -> None:
        """A trainer until it is dead: without the last words that `running` gives a consumer."""
        killer.dead.clear()
        killer.buried.clear()
        jobs = JobStore(redis)
        async with jobs.lease("trainer", 60) as lease:
            leading = Lifecycle(stages, jobs, lease)
            consumer = Consumer(redis, DECISIONS, model=PromptDecided, batch=8)
            tasks = [asyncio.create_task(work) for work in (leading.run(), consumer.run(leading.keep), killer.dead.wait())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await end_tasks(*tasks)
        killer.buried.set()

    job = await submit(redis, stages, total=None, rounds=3, activate=True)
    async with fed(redis, stages, one_more_each) as prompts, asyncio.timeout(PATIENCE):
        while not (done := await JobStore(redis).get(job.id)).state.ended:
            await live()
    assert (done.state, done.round, done.policy_set) == (JobState.COMPLETED, 3, "demo:4"), done.error
    steps = {step.partition(" ")[0] for step in killer.deaths}
    assert steps == {"_advance", "publish", "report", "append", "activate", "run_training"} and len(killer.deaths) > 30
    assert [one.id.removeprefix(f"{job.id}/") for one in prompts] == ["1/0", "1/1", "1/2", "2/1", "2/2", "3/2"]
    assert runs == [f"round-{k}/{objective}" for k in range(4) for objective in OBJECTIVES], "each training once"
    assert [one.manifest.parent for one in stages.store.sets()] == [None, "demo:1", "demo:2", "demo:3"]
    assert stages.store.get("demo").id == "demo:4"
    report = report_of(stages, job)
    assert [(one.round, one.funnel.prompts, one.policy_set) for one in report.rounds] == [
        (1, 3, "demo:2"),
        (2, 2, "demo:3"),
        (3, 1, "demo:4"),
    ]
    assert (report.policy_set, report.activated, report.reason) == ("demo:4", True, None)


TRAINER = """
from services.common.web.app import serve
from services.common.queue import connect
from services.common.settings import load
from services.trainer.app import create_app, open_stages
from services.trainer.settings import TrainerSettings

settings = load(TrainerSettings)
app = create_app(settings, connect(settings.redis_url), open_stages, [], lease_seconds=4)
serve(app, settings.host, settings.trainer_port)
"""
"""services.trainer with a lease that a dead trainer does not keep for long."""


@pytest.mark.slow
async def test_kill_9_of_the_trainers_process_in_every_round_publishes_each_set_once(
    redis: Redis, redis_url: str, data_dir: Path, tiny_base: Path, adapter: Path
) -> None:
    """With the real training processes, which die with their trainer."""
    stages = await asyncio.to_thread(open_stages, TrainerSettings(data_dir=data_dir, model=str(tiny_base)))
    policies(stages, adapter)
    job = await submit(redis, stages, total=None, rounds=2, round_prompts="all", activate=True)
    env = {
        "SIPO_DATA_DIR": str(data_dir),
        "SIPO_MODEL": str(tiny_base),
        "SIPO_REDIS_URL": redis_url,
        "SIPO_TRAINER_PORT": str(free_ports(1)[0]),
    }

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", TRAINER], env=os.environ | env)

    @contextmanager
    def kept_running() -> Iterator[Callable[[], None]]:
        """Killed at the end. What is given starts it again if it has ended before, as the supervisor does: on a busy machine it may
        lose its short lease."""
        trainer = start()

        def keep() -> None:
            nonlocal trainer
            if trainer.poll() is not None:
                trainer = start()

        try:
            yield keep
        finally:
            trainer.kill()
            trainer.wait()

    async def known() -> Job:
        return await JobStore(redis).get(job.id)

    def there(round_: int, objective: str, name: str) -> bool:
        return (stages.files(job).training_run(round_, objective) / name).exists()

    moments: list[Callable[[Job], bool]] = [
        lambda _: there(1, "warm", "reference-train.safetensors"),
        lambda _: there(2, "concise", "metrics.json"),
        lambda now: now.state == JobState.COMPLETED,
    ]
    told: set[tuple[int, str]] = set()
    async with fed(redis, stages, lambda _round, _row: True) as prompts, asyncio.timeout(PATIENCE):
        for moment in moments:
            with kept_running() as keep:
                while not moment(now := await known()):
                    keep()
                    assert now.state not in (JobState.FAILED, JobState.CANCELLED), now.error
                    if now.progress:
                        told.add((now.round, now.progress["objective"]))
                    await asyncio.sleep(0.02)
    done = await known()
    assert (done.policy_set, done.counts.decided) == ("demo:3", 3)
    assert told == {(round_, objective) for round_ in (1, 2) for objective in OBJECTIVES}
    assert [one.id.removeprefix(f"{job.id}/") for one in prompts] == ["1/0", "1/1", "1/2", "2/0", "2/1", "2/2"]
    sets = stages.store.sets()
    assert [(one.id, one.manifest.parent) for one in sets] == [("demo:1", None), ("demo:2", "demo:1"), ("demo:3", "demo:2")]
    assert stages.store.get("demo").id == "demo:3"
    assert [one.policy_set for one in report_of(stages, job).rounds] == ["demo:2", "demo:3"]
    for objective in OBJECTIVES:
        weights = [load_file(one.adapter_dir(objective) / "adapter_model.safetensors") for one in sets]
        for before, after in pairwise(weights):
            assert before.keys() == after.keys()
            assert not all(torch.equal(before[name], after[name]) for name in before)
