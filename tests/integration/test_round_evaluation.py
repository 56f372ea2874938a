"""Jobs that evaluate their rounds: which prompts are held out, and what becomes of them. The engine answers by rote."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from gateway.app import create_app
from gateway.settings import GatewaySettings
from services.common.contract.jobs import JobState
from services.trainer.rounds import Stages
from sipo.evaluation.prompts import TestPrompt
from sipo.models import Base
from support import PATIENCE
from tests.fakes import FakeDecoder
from tests.trainer import decide, policies, report_of, submit, trainer, until

JUDGES = {"concise": "python:concise", "warm": "python:warm"}
ASKED = {"judges": JUDGES, "weights": 3, "max_tokens": 8}


@pytest.fixture
def stages(stages: Stages, tiny_base: Path, data_dir: Path, adapter: Path) -> Stages:
    """Over the tiny base as it is known by its weights, with a set demo:1."""
    cache_dir = data_dir / "cache"
    settings = stages.evaluator.settings.model_copy(update={"cache_dir": cache_dir})
    stages = replace(stages, base=Base.open(str(tiny_base), cache_dir), evaluator=replace(stages.evaluator, settings=settings))
    policies(stages, adapter)
    return stages


@pytest.fixture
async def gateway(data_dir: Path, tiny_base: Path, redis: Redis, stages: Stages) -> AsyncIterator[httpx.AsyncClient]:
    decoder = httpx.AsyncClient(transport=httpx.ASGITransport(FakeDecoder().app), base_url="http://decoder")
    settings = GatewaySettings(data_dir=data_dir, cache_dir=data_dir / "cache", model=str(tiny_base))
    app = create_app(settings, decoder, redis)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


def rows(*splits: str, conflicting: bool = True) -> list[dict[str, Any]]:
    labels = {"concise": 0, "warm": int(conflicting)}
    return [
        {"prompt": f"{split} {index}?", "response_0": "a", "response_1": "b", "labels": labels, "split": split}
        for index, split in enumerate(splits)
    ]


async def post(gateway: httpx.AsyncClient, examples: list[dict[str, Any]], **evaluation: Any) -> httpx.Response:
    quick = {"max_tokens": 8, "review_max_tokens": 8}
    spec = {"policy": "demo", **quick, **evaluation.pop("spec", {}), "evaluation": ASKED | evaluation}
    return await gateway.post("/v1/jobs", json={"spec": spec, "examples": examples})


def held_out(data_dir: Path, job: str) -> list[TestPrompt]:
    lines = (data_dir / "jobs" / job / "held_out.jsonl").read_text().splitlines()
    return [TestPrompt.model_validate_json(line) for line in lines]


async def test_the_rows_that_are_marked_so_are_held_out(gateway: httpx.AsyncClient, data_dir: Path) -> None:
    examples = rows("train", "test", "validation", "train", "test")
    reply = await post(gateway, examples, max_prompts=2)
    assert reply.status_code == 201, reply.text
    kept = held_out(data_dir, reply.json()["id"])
    assert [one.prompt for one in kept] == ["test 1?", "validation 2?"] and kept[0].originals == ("a", "b")
    text = "".join(json.dumps(row) + "\n" for row in examples)
    spec = json.dumps({"policy": "demo", "evaluation": ASKED, "max_tokens": 8})
    uploaded = await gateway.post("/v1/jobs", data={"spec": spec}, files={"file": ("pairs.jsonl", text)})
    assert [one.prompt for one in held_out(data_dir, uploaded.json()["id"])] == ["test 1?", "validation 2?", "test 4?"]


async def test_without_any_those_that_no_round_samples_are(gateway: httpx.AsyncClient, data_dir: Path) -> None:
    reply = await post(gateway, [*rows("x", "y", "z", "v"), *rows("w", conflicting=False)], spec={"max_prompts": 2})
    assert reply.status_code == 201, reply.text
    assert [one.prompt for one in held_out(data_dir, reply.json()["id"])] == ["z 2?", "v 3?", "w 0?"]


@pytest.mark.parametrize(
    ("examples", "asked", "words"),
    [
        (rows("x", "y", "z"), {"spec": {"max_prompts": 2}}, "an evaluation needs 2 prompts or more that the job does not train on"),
        (rows("x", "y", "z"), {"spec": {"max_prompts": 1, "policy": "new"}}, "as a first alignment trains on all others"),
        (rows("x", "test", "test"), {"judges": {"concise": "python:concise", "kind": "python:warm"}}, "there are judges of"),
        (rows("x", "test", "test"), {"judges": JUDGES | {"warm": "hf:/models/x"}}, "no judge 'hf:/models/x'"),
        (rows("x", "test", "test"), {"max_tokens": 250}, "2 prompts would leave no room for 250 tokens"),
        (rows("x", "test", "test"), {"spec": {"stop_after": "pairs"}}, "trains no policies to evaluate"),
        ([*rows("x", "test", "test"), {**rows("y")[0], "prompt": "TEST  1?"}], {}, "1 of 2 test prompts is in the training data"),
    ],
)
async def test_a_job_whose_rounds_cannot_be_evaluated_is_refused(
    gateway: httpx.AsyncClient, data_dir: Path, examples: list[dict[str, Any]], asked: dict[str, Any], words: str
) -> None:
    reply = await post(gateway, examples, **asked)
    assert reply.status_code == 400, reply.text
    assert words in reply.json()["error"]["message"]
    assert not list((data_dir / "jobs").glob("*"))


@pytest.mark.slow
async def test_a_round_is_evaluated_before_it_is_published_and_the_report_has_the_figures(
    gateway: httpx.AsyncClient, redis: Redis, stages: Stages, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.touch()
    command = (sys.executable, "-m", "tests.evaluation_child", str(log), "0")
    stages = replace(stages, evaluator=replace(stages.evaluator, command=command))
    job = await submit(redis, stages, evaluation=ASKED)
    prompts = [TestPrompt(prompt=f"Held out {number}?") for number in range(3)]
    stages.files(job).held_out.write_text("".join(f"{one.model_dump_json()}\n" for one in prompts))
    async with trainer(redis, stages):
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED, seconds=2 * PATIENCE)
    assert done.artifacts["evaluation-1"] == "evaluation-1/front/index.html"
    evaluation = report_of(stages, job).rounds[0].evaluation
    assert evaluation is not None
    assert (evaluation.prompts, evaluation.error, evaluation.hypervolume.keys()) == (3, None, {"before", "after"})
    assert evaluation.difference is not None and evaluation.difference.value == 0, "the engine answers both alike"
    page = await gateway.get(f"/v1/jobs/{job.id}/evaluations/1/index.html")
    assert page.status_code == 200 and f"demo, round 1 of {job.id}" in page.text
    assert f"Job {job.id}, policies demo" in page.text and "From prompts to training pairs" in page.text
    assert "the job’s input" in page.text, "how much its objectives disagree"
    own = await gateway.get(f"/v1/jobs/{job.id}/report.html")
    assert 'href="evaluations/1/index.html"' in own.text and "Between after and before no difference is certain" in own.text
    for path in ("1/plan.json", "2/index.html"):
        assert (await gateway.get(f"/v1/jobs/{job.id}/evaluations/{path}")).status_code == 404


async def test_an_evaluation_that_fails_does_not_lose_the_round(redis: Redis, stages: Stages) -> None:
    command = (sys.executable, "-c", 'import sys; print(\'{"error": "the judge is silent"}\'); sys.exit(1)')
    stages = replace(stages, evaluator=replace(stages.evaluator, command=command))
    job = await submit(redis, stages, evaluation=ASKED)
    stages.files(job).held_out.write_text("".join(f'{{"prompt": "{number}?"}}\n' for number in range(2)))
    async with trainer(redis, stages):
        await decide(redis, job)
        done = await until(redis, job, JobState.COMPLETED)
    evaluation = report_of(stages, job).rounds[0].evaluation
    assert (done.policy_set, evaluation and evaluation.error) == ("demo:2", "the judge is silent")
    assert "evaluation-1" not in done.artifacts
    assert "It could not be evaluated: the judge is silent." in stages.files(job).page.read_text()
