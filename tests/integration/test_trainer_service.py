"""Jobs through the trainer on a real queue server. Training is a quick stand-in here, but for the tests that say so."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from redis.asyncio import Redis
from redis.exceptions import RedisError
from safetensors.torch import load_file, save_file

from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobState
from services.common.contract.keys import DECISIONS, job_key
from services.common.contract.messages import PromptDecided
from services.common.local.training import run_child
from services.common.queue import Queue, connect
from services.common.web.clients import DecoderClient
from services.decoder.settings import DecoderSettings
from services.trainer import decoders
from services.trainer.app import TRAINER_LEASE, create_app
from services.trainer.rounds import Stages
from services.trainer.settings import TrainerSettings
from sipo.errors import Conflict, TrainingFailed
from sipo.policies import JobRound
from sipo.training.run_folder import read_run
from sipo.training.settings import Progress, TrainMetrics
from support import PATIENCE
from tests.fakes import FakeEngine, served
from tests.trainer import OBJECTIVES, Tell, decide, decision, policies, report_of, submit, trainer, until


async def test_a_job_without_policies_aligns_samples_trains_and_publishes(redis: Redis, stages: Stages, runs: list[str]) -> None:
    job = await submit(redis, stages, activate=True)
    async with trainer(redis, stages):
        generating = await until(redis, job, JobState.GENERATING)
        assert (generating.sampling_set, generating.reward_set) == ("demo:1", "demo:1")
        assert stages.store.current("demo") is None, "a first alignment does not move current"
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED)
    assert runs == ["round-0/concise", "round-0/warm", "round-1/concise", "round-1/warm"]
    assert done.policy_set == "demo:2" and stages.store.get("demo").id == "demo:2"
    manifest = stages.store.get("demo:2").manifest
    assert (manifest.round, manifest.parent, manifest.made_by) == (1, "demo:1", JobRound(job=job.id, round=1))
    assert done.counts.model_dump() == {"queued": 0, "sampled": 0, "decided": 3, "accepted": 3, "none": 0, "failed": 0}
    report = report_of(stages, job)
    [only] = report.rounds
    assert (report.policy_set, report.activated, report.reason) == (only.policy_set, True, None) == ("demo:2", True, None)
    assert (only.sampling_set, only.reward_set, only.funnel.accepted, only.funnel.pairs) == ("demo:1", "demo:1", 3, 6)
    assert report.alignment.keys() == only.training.keys() == set(OBJECTIVES)
    assert only.candidates is not None
    assert (only.candidates.stages["sample"].candidates, only.candidates.accepted.responses) == (3, 3)
    assert done.artifacts == {"decisions": "decisions.jsonl", "report": "report.json", "page": "report.html"}
    page = stages.files(job).page.read_text()
    assert "demo:2, which became current" in page and "of 3 prompts 3 have a response that passed the filter" in page


async def test_a_page_that_cannot_be_made_does_not_lose_the_job(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such colour")

    monkeypatch.setattr("services.trainer.page.write_report_page", broken)
    policies(stages, adapter)
    job = await submit(redis, stages)
    async with trainer(redis, stages):
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED)
    assert done.artifacts == {"decisions": "decisions.jsonl", "report": "report.json"}


async def test_the_application_is_ready_once_it_has_base_and_lease_and_then_leads_jobs_to_their_end(
    redis: Redis, redis_url: str, stages: Stages, runs: list[str], data_dir: Path
) -> None:
    found = threading.Event()
    opened_with: list[TrainerSettings] = []

    def open_stages(settings: TrainerSettings) -> Stages:
        opened_with.append(settings)
        assert found.wait(PATIENCE)
        return stages

    asked: list[str] = []

    def sleeps(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(200, json={"state": "asleep"})

    settings = TrainerSettings(data_dir=data_dir)
    decoder = DecoderClient("http://decoder", transport=httpx.MockTransport(sleeps))
    app = create_app(settings, connect(redis_url), open_stages, [decoder])
    job = await submit(redis, stages)
    async with AsyncExitStack() as stack:
        other_trainer = await stack.enter_async_context(AsyncExitStack())
        await other_trainer.enter_async_context(JobStore(redis).lease(TRAINER_LEASE, 60))
        await stack.enter_async_context(app.router.lifespan_context(app))
        client = await stack.enter_async_context(httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://trainer"))

        async def told(words: str) -> httpx.Response:
            async with asyncio.timeout(PATIENCE):
                while words not in (reply := await client.get("/ready")).text:  # noqa: ASYNC110, it is asked as from outside
                    await asyncio.sleep(0.05)
            return reply

        assert (await told("not ready: the base model is being looked up")).status_code == 503
        found.set()
        assert (await told("not ready: another trainer holds the lease")).status_code == 503
        assert (await JobStore(redis).get(job.id)).state == JobState.QUEUED
        await other_trainer.aclose()
        assert (await told('"status":"ready"')).status_code == 200
        await until(redis, job, JobState.GENERATING)
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED)
    assert opened_with == [settings]
    assert (done.policy_set, runs) == ("demo:2", [f"round-{k}/{objective}" for k in (0, 1) for objective in OBJECTIVES])
    assert asked == ["/v1/sleep", "/v1/wake"] * 2, "once for each training"
    with pytest.raises(RuntimeError, match="closed"):
        await decoder.ready()


async def test_a_round_trains_every_policy_on_the_same_pairs_from_its_own_adapter(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path
) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages, learning_rates={"warm": 1e-3})
    async with trainer(redis, stages):
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED)
    assert runs == ["round-1/concise", "round-1/warm"]
    texts = [(stages.files(job).training_run(1, objective) / "pairs.jsonl").read_text() for objective in OBJECTIVES]
    assert texts[0] == texts[1]
    assert [json.loads(line) for line in texts[0].splitlines()][:2] == [
        {"prompt": "q0", "chosen": "best 0", "rejected": "a0", "chosen_token_ids": [5, 6, 0, 0]},
        {"prompt": "q0", "chosen": "best 0", "rejected": "b0", "chosen_token_ids": [5, 6, 0, 0]},
    ]
    read = [read_run(stages.files(job).training_run(1, objective) / "run.yaml") for objective in OBJECTIVES]
    assert [run.start for run in read] == [stages.store.get("demo:1").adapter_dir(objective) for objective in OBJECTIVES]
    rates = {objective: run.settings.learning_rate for objective, run in zip(OBJECTIVES, read, strict=True)}
    assert rates == {"concise": job.spec.training.learning_rate, "warm": 1e-3}
    assert stages.store.get(done.policy_set or "").manifest.settings["learning_rates"] == rates
    assert stages.store.get("demo").id == "demo:1", "the job did not ask for activation"


async def test_rewards_stay_those_of_the_first_alignment(redis: Redis, stages: Stages, adapter: Path) -> None:
    policies(stages, adapter)
    policies(stages, adapter, round=1, parent="demo:1")
    job = await submit(redis, stages)
    async with trainer(redis, stages):
        generating = await until(redis, job, JobState.GENERATING)
    assert (generating.sampling_set, generating.reward_set) == ("demo:2", "demo:1")


async def test_a_job_may_stop_after_its_pairs(redis: Redis, stages: Stages, runs: list[str], adapter: Path) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages, stop_after="pairs")
    async with trainer(redis, stages):
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED)
    assert runs == [] and done.policy_set is None
    assert report_of(stages, job).rounds[0].funnel.pairs == 6


async def test_a_job_without_an_accepted_response_fails_with_the_filters_figures(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path
) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages)
    async with trainer(redis, stages):
        await decide(redis, job, accepted=False)
        failed = await until(redis, job, JobState.FAILED)
    assert runs == [] and failed.error is not None
    assert "in 3 prompts with 3 candidates (rejected: 3 worse_than_original; prompts failed: 0)" in failed.error


@pytest.mark.slow
async def test_separate_responses_train_each_policy_on_its_own_pairs_and_need_some_for_each(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path
) -> None:
    policies(stages, adapter)
    async with trainer(redis, stages):
        for objectives, state in ((["warm"] * 3, JobState.FAILED), (["warm", "concise", "warm"], JobState.COMPLETED)):
            job = await submit(redis, stages)
            for row, objective in enumerate(objectives):
                await Queue(redis).put(DECISIONS, decision(job.id, row, objective=objective))
            ended = await until(redis, job, state)
            if state == JobState.FAILED:
                assert runs == [] and "no response passed the filter for concise, in 3 prompts" in (ended.error or "")
    texts = {name: (stages.files(job).training_run(1, name) / "pairs.jsonl").read_text() for name in OBJECTIVES}
    pairs = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs["concise"]] == [("best 1", "a1")]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs["warm"]] == [("best 0", "b0"), ("best 2", "b2")]


async def test_accepted_prompts_without_a_pair_for_an_objective_are_told_as_such(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path
) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages, preferences="original")
    async with trainer(redis, stages):
        for row in range(3):
            one = decision(job.id, row)
            only_concise = one.example.model_copy(update={"labels": {"concise": 0}})
            await Queue(redis).put(DECISIONS, one.model_copy(update={"example": only_concise}))
        failed = await until(redis, job, JobState.FAILED)
    assert runs == []
    assert failed.error == (
        "no pair for warm with preferences: original, as none of the prompts with an accepted response (3) has a label for it"
    )


async def test_progress_that_cannot_be_told_is_lost_and_no_more(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go_away(*_: Any, **_fields: Any) -> Job:
        raise RedisError("the queue server went away")

    monkeypatch.setattr(JobStore, "update", go_away)
    policies(stages, adapter)
    job = await submit(redis, stages)
    async with trainer(redis, stages):
        await decide(redis, job)
        await until(redis, job, JobState.COMPLETED)
    assert runs == ["round-1/concise", "round-1/warm"], "each once"


async def test_a_run_whose_job_has_ended_is_told_so(redis: Redis, stages: Stages, adapter: Path) -> None:
    refused = asyncio.Event()

    async def tell_of_a_cancelled_job(path: Path, tell: Tell) -> TrainMetrics:
        await JobStore(redis).cancel(job.id)
        try:
            await tell(Progress(objective="concise", stage="training", step=1, of=2, seconds_left=1))
        except Conflict:
            refused.set()
            raise
        raise AssertionError

    stages = replace(stages, run_training=tell_of_a_cancelled_job)
    policies(stages, adapter)
    job = await submit(redis, stages)
    async with trainer(redis, stages):
        await decide(redis, job)
        async with asyncio.timeout(PATIENCE):
            await refused.wait()


async def test_a_prompt_that_is_decided_after_its_round_has_closed_changes_nothing(
    redis: Redis, stages: Stages, adapter: Path
) -> None:
    """It had failed, was re-queued, and came back while the policies were trained."""
    policies(stages, adapter)
    job = await submit(redis, stages)
    failed = decision(job.id, 1, accepted=False).model_copy(update={"outcome": "failed", "error": "no room"})
    train = stages.run_training

    async def train_while_it_comes(path: Path, tell: Tell) -> TrainMetrics:
        await Queue(redis).put(DECISIONS, decision(job.id, 1))
        while await redis.xlen(DECISIONS):  # noqa: ASYNC110, the trainer empties it
            await asyncio.sleep(0.02)
        return await train(path, tell)

    stages = replace(stages, run_training=train_while_it_comes)
    async with trainer(redis, stages):
        for one in (decision(job.id, 0), failed, decision(job.id, 2)):
            await Queue(redis).put(DECISIONS, one)
        done = await until(redis, job, JobState.COMPLETED)
    assert (done.counts.accepted, done.counts.failed) == (2, 1)
    assert report_of(stages, job).rounds[0].funnel.pairs == 4


async def test_a_training_that_fails_ends_the_job_and_leaves_the_policies(redis: Redis, stages: Stages, adapter: Path) -> None:
    async def diverge(path: Path, tell: Tell) -> TrainMetrics:
        raise TrainingFailed("it diverged")

    stages = replace(stages, run_training=diverge)
    policies(stages, adapter)
    job = await submit(redis, stages, activate=True)
    async with trainer(redis, stages):
        await decide(redis, job)
        failed = await until(redis, job, JobState.FAILED)
    assert failed.error == "it diverged" and [one.id for one in stages.store.sets()] == ["demo:1"]


@pytest.mark.parametrize("allowed", [True, False])
async def test_the_decoder_sleeps_while_policies_are_trained(
    redis: Redis, stages: Stages, runs: list[str], data_dir: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    monkeypatch.setattr(decoders, "DRAIN_POLL_SECONDS", 0.01)
    engine = FakeEngine()
    engine.calls = runs  # one list of what happens
    settings = DecoderSettings(
        data_dir=data_dir, cache_dir=data_dir / "cache", model=str(stages.base.folder), decoder_sleeps=allowed
    )
    job = await submit(redis, stages)
    async with served(engine, settings) as app:
        client = DecoderClient("http://decoder", transport=httpx.ASGITransport(app))
        async with trainer(redis, stages, [client]):
            if allowed:
                await until(redis, job, JobState.GENERATING)
                await decide(redis, job)
            ended = await until(redis, job, JobState.COMPLETED if allowed else JobState.FAILED)
    if allowed:
        assert runs == [
            *("sleep", "round-0/concise", "round-0/warm", "wake"),
            *("sleep", "round-1/concise", "round-1/warm", "wake"),
        ]
    else:
        assert runs == [] and "SIPO_DECODER_SLEEPS=true" in (ended.error or "")


@pytest.mark.slow
async def test_decisions_are_kept_while_another_job_trains_and_cancel_ends_the_training(
    redis: Redis, stages: Stages, adapter: Path
) -> None:
    ended = asyncio.Event()

    async def endless(path: Path, tell: Tell) -> TrainMetrics:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    stages = replace(stages, run_training=endless)
    policies(stages, adapter)
    first, second = await submit(redis, stages), await submit(redis, stages, stop_after="pairs")
    async with trainer(redis, stages):
        await decide(redis, first)
        await until(redis, first, JobState.TRAINING)
        await decide(redis, second)
        await until(redis, second, JobState.COMPLETED)
        await JobStore(redis).cancel(first.id)
        async with asyncio.timeout(PATIENCE):
            await ended.wait()
    assert (await JobStore(redis).get(first.id)).state == JobState.CANCELLED


@pytest.mark.slow
@pytest.mark.parametrize(("state", "upgraded"), [("training", False), ("publishing", False), ("publishing", True)])
async def test_a_set_that_was_published_before_a_crash_is_not_published_again(
    redis: Redis, stages: Stages, runs: list[str], adapter: Path, state: str, upgraded: bool
) -> None:
    """Nor after an upgrade: job and round were among the settings before there was made_by."""
    asked: list[httpx.Request] = []
    decoder = DecoderClient("http://decoder", transport=httpx.MockTransport(asked.append))  # type: ignore[arg-type]
    policies(stages, adapter)
    job = await submit(redis, stages)
    async with trainer(redis, stages):
        await decide(redis, job)
        found = await until(redis, job, JobState.COMPLETED)
    assert found.policy_set == "demo:2"
    if upgraded:
        path = stages.store.get("demo:2").folder / "manifest.json"
        manifest = json.loads(path.read_text())
        made_by = manifest.pop("made_by")
        manifest["settings"] |= {"job": made_by["job"], "job_round": made_by["round"]}
        path.write_text(json.dumps(manifest))
    # The state as it stood when the trainer died between its work and telling so.
    await redis.hset(job_key(job.id), mapping={"state": state, "policy_set": "null"})
    async with trainer(redis, stages, [decoder]):
        done = await until(redis, job, JobState.COMPLETED)
    assert done.policy_set == "demo:2"
    assert [one.id for one in stages.store.sets()] == ["demo:1", "demo:2"]
    assert runs == ["round-1/concise", "round-1/warm"], "what was trained is not trained again"
    assert not asked, "no decoder sleeps for nothing"


@pytest.mark.slow
async def test_a_trainer_goes_on_in_the_middle_of_a_training(redis: Redis, stages: Stages, runs: list[str], adapter: Path) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages)
    blocked = asyncio.Event()

    async def die_in_the_second(path: Path, tell: Tell) -> TrainMetrics:
        if path.parent.name == "warm":
            blocked.set()
            await asyncio.Event().wait()
        return await stages.run_training(path, tell)

    async with trainer(redis, replace(stages, run_training=die_in_the_second)):
        await decide(redis, job)
        async with asyncio.timeout(PATIENCE):
            await blocked.wait()
    assert (await JobStore(redis).get(job.id)).state == JobState.TRAINING
    async with trainer(redis, stages):
        await until(redis, job, JobState.COMPLETED)
    assert runs == ["round-1/concise", "round-1/warm"]


async def test_a_decision_delivered_again_after_a_crash_is_there_once(redis: Redis, stages: Stages, adapter: Path) -> None:
    policies(stages, adapter)
    job = await submit(redis, stages, stop_after="pairs")
    path = stages.files(job).decisions
    lines = [decision(job.id, row).model_dump_json() + "\n" for row in range(2)]
    path.write_text(lines[0] + lines[1][:50])  # written, but neither counted nor acknowledged; the second one torn
    async with trainer(redis, stages):
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED)
    assert [PromptDecided.model_validate_json(line).prompt for line in path.read_text().splitlines()] == ["0", "1", "2"]
    assert (done.counts.decided, done.counts.accepted) == (3, 3)
    assert await redis.xlen(DECISIONS) == 0


@pytest.mark.slow
async def test_what_the_training_process_says_before_it_fails_becomes_the_jobs_error(
    redis: Redis, stages: Stages, adapter: Path
) -> None:
    policies(stages, adapter)
    # Damaged after publishing, which refuses such values.
    for objective in OBJECTIVES:
        path = stages.store.get("demo").adapter_dir(objective) / "adapter_model.safetensors"
        save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}, path)
    job = await submit(redis, stages, activate=True)
    async with trainer(redis, replace(stages, run_training=run_child)):
        await decide(redis, job)
        failed = await until(redis, job, JobState.FAILED)
    assert failed.error is not None and "diverged at step 1" in failed.error
    assert stages.store.get("demo").id == "demo:1"
