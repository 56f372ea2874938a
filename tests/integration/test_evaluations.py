"""Evaluations over HTTP, from their posting to their end, on a real queue server; the engine answers by rote."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from gateway.app import create_app
from gateway.settings import GatewaySettings
from services.common.background import end_tasks
from services.common.contract.evaluation_store import Evaluation, EvaluationStore
from services.common.contract.evaluations import EvaluationState
from services.common.contract.job_store import JobStore
from services.common.contract.keys import EVALUATIONS
from services.common.web.clients import DecoderClient
from services.trainer.evaluations import Evaluations
from services.trainer.evaluator import Evaluator
from services.trainer.lifecycle import Lifecycle
from services.trainer.rounds import Stages
from services.trainer.settings import TrainerSettings
from sipo.evaluation.report import EvaluationReport
from sipo.models import Base
from sipo.policies import JobRound
from sipo.resources import Machine, this_machine
from support import PATIENCE
from tests.fakes import FakeDecoder
from tests.trainer import policies

JUDGES = {"concise": "python:concise", "warm": "kind"}
PROMPTS = [f"What is {number}?" for number in range(4)]
CPU = Machine(device="CPU", gpu=False, memory=2**40, bytes_per_weight=2)


@pytest.fixture
def stages(stages: Stages, tiny_base: Path, data_dir: Path) -> Stages:
    """Over the tiny base as it is known by its weights."""
    return replace(stages, base=Base.open(str(tiny_base), data_dir / "cache"))


@pytest.fixture
async def gateway(
    data_dir: Path, tiny_base: Path, redis: Redis, stages: Stages, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """Without its lifespan. "demo" has a current set, demo:1, for concise and warm."""
    policies(stages, adapter)
    monkeypatch.setattr("services.trainer.evaluations.POLL_SECONDS", 0.05)
    decoder = httpx.AsyncClient(transport=httpx.ASGITransport(FakeDecoder().app), base_url="http://decoder")
    places = {"data_dir": data_dir, "cache_dir": data_dir / "cache", "model": str(tiny_base)}
    settings = GatewaySettings(**places, evaluation_judges={"kind": "python:warm", "huge": f"hf:{tiny_base}"})
    app = create_app(settings, decoder, redis)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


async def post(gateway: httpx.AsyncClient, prompts: Any = PROMPTS, **spec: Any) -> httpx.Response:
    asked = {"methods": ["base", "mod@1=mod:demo", "soup=soup:demo"], "judges": JUDGES, "weights": 3, "max_tokens": 8} | spec
    return await gateway.post("/v1/evaluations", json={"spec": asked, "prompts": prompts})


def evaluator_of(stages: Stages, log: Path, stop: int = 0) -> Evaluator:
    """Its processes are those of tests.evaluation_child."""
    log.touch()
    settings = TrainerSettings(
        data_dir=stages.jobs_dir.parent,
        cache_dir=stages.jobs_dir.parent / "cache",
        model=str(stages.base.folder),
        evaluation_judges={"kind": "python:warm"},
    )
    return Evaluator(settings, (sys.executable, "-m", "tests.evaluation_child", str(log), str(stop)))


@asynccontextmanager
async def evaluating(redis: Redis, stages: Stages, evaluator: Evaluator, *decoders: DecoderClient) -> AsyncIterator[None]:
    jobs = JobStore(redis)
    async with jobs.lease("trainer", 60) as lease:
        turn = Lifecycle(stages, jobs, lease, decoders).turn
        task = asyncio.create_task(Evaluations(evaluator, EvaluationStore(redis), lease, turn).run())
        try:
            yield
        finally:
            await end_tasks(task)


async def until(redis: Redis, id: str, *states: EvaluationState) -> Evaluation:
    async with asyncio.timeout(PATIENCE):
        while (found := await EvaluationStore(redis).get(id)).state not in states:
            assert not found.state.ended, found.error
            await asyncio.sleep(0.05)
    return found


async def waiting(log: Path) -> int:
    """The id of the process that waits to be ended."""
    async with asyncio.timeout(PATIENCE):
        while "waits" not in (said := await asyncio.to_thread(log.read_text)):  # noqa: ASYNC110, it is another process that writes
            await asyncio.sleep(0.05)
    return int(said.split()[-1])


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


async def test_an_evaluation_is_told_where_it_runs_and_its_sets_are_those_of_now(
    gateway: httpx.AsyncClient, redis: Redis, stages: Stages, data_dir: Path
) -> None:
    unknown = (await post(gateway)).json()
    assert (unknown["state"], unknown["prompts"], unknown["runs_on"]) == ("queued", 4, None)
    await EvaluationStore(redis).tell_machine(CPU)
    posted = (await post(gateway, [*PROMPTS, PROMPTS[0]], max_prompts=3, weights=[{"concise": 0.3, "warm": 0.7}])).json()
    assert posted["spec"]["methods"] == ["base", "mod@1=mod:demo:1", "soup=soup:demo:1"]
    assert (posted["prompts"], posted["runs_on"]["device"], posted["runs_on"]["judges"]) == (3, "CPU", {})
    assert posted["runs_on"]["engine"] > 2 * 2**30
    assert [one["id"] for one in (await gateway.get("/v1/evaluations")).json()["data"]] == [posted["id"], unknown["id"]]
    assert (await gateway.get(f"/v1/evaluations/{posted['id']}")).json() == posted
    assert (await gateway.get(f"/v1/evaluations/{posted['id']}/report.json")).status_code == 404
    lines = (data_dir / "evaluations" / posted["id"] / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 3


async def test_prompts_may_be_uploaded_or_those_that_ship_with_the_project(gateway: httpx.AsyncClient) -> None:
    spec = {"spec": '{"methods": ["base"], "judges": {"concise": "python:concise", "warm": "kind"}, "max_tokens": 8}'}
    for name, content in (("prompts.txt", "One?\nTwo?\n"), ("rows.jsonl", '{"prompt": "One?"}\n{"prompt": "Two?"}\n')):
        reply = await gateway.post("/v1/evaluations", data=spec, files={"file": (name, content)})
        assert (reply.status_code, reply.json().get("prompts")) == (201, 2), reply.text
    assert (await post(gateway, "bundled", max_prompts=5)).json()["prompts"] == 5
    for content, param, words in (
        ({"data": spec, "files": {"other": ("p.txt", "One?")}}, "file", "curl -F file=@FILE"),
        ({"files": {"file": ("p.txt", "One?")}}, "spec", "the form needs a field `spec`"),
        ({"data": spec, "files": {"file": ("p.txt", "")}}, "file", "the file is empty"),
    ):
        reply = await gateway.post("/v1/evaluations", **content)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
        assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("prompts", "spec", "words"),
    [
        (PROMPTS, {"methods": ["base", "x=mod:./adapters"]}, "folders and files of its disk are for `sipo evaluate`"),
        (PROMPTS, {"methods": ["base:/models/other"]}, "none that can be asked for over HTTP"),
        (PROMPTS, {"methods": ["x=mod:demo@/models/other"]}, "none that can be asked for over HTTP"),
        (PROMPTS, {"methods": ["x=models:file.yaml"]}, "none that can be asked for over HTTP"),
        (PROMPTS, {"methods": ["x=mod:nobody"]}, "no current policy set named 'nobody'"),
        (PROMPTS, {"methods": ["x=mod:demo:9"]}, "no policy set 'demo:9'"),
        (PROMPTS, {"judges": JUDGES | {"warm": "http://10.0.0.1/score"}}, "no judge 'http://10.0.0.1/score': give python:NAME"),
        (PROMPTS, {"judges": JUDGES | {"warm": "hf:/etc"}}, "SIPO_EVALUATION_JUDGES, which has huge, kind"),
        (PROMPTS, {"judges": JUDGES | {"warm": "python:nobody"}}, "no reward model 'nobody' is installed"),
        (PROMPTS, {"judges": {"concise": "kind", "polite": "kind"}}, "demo:1 has policies for concise, warm"),
        (PROMPTS, {"judges": {"concise": "kind"}}, "must have at least 2 items"),
        (PROMPTS, {"weights": [{"concise": 0.9, "warm": 0.3}]}, "sum to 1.2"),
        (PROMPTS, {"against": ["nobody"]}, "there is no method 'nobody' to compare with"),
        (PROMPTS, {"max_tokens": 250}, "4 prompts would leave no room for 250 tokens"),
        (["One?"], {}, "intervals need 2 prompts or more"),
        (PROMPTS, {"judges": JUDGES | {"warm": "huge"}}, "and the evaluation may take 0.0 GiB on CPU"),
    ],
)
async def test_what_cannot_be_evaluated_is_refused_and_leaves_nothing(
    gateway: httpx.AsyncClient, redis: Redis, data_dir: Path, prompts: list[str], spec: dict[str, Any], words: str
) -> None:
    small = CPU.model_copy(update={"memory": 2**20}) if spec.get("judges", {}).get("warm") == "huge" else CPU
    await EvaluationStore(redis).tell_machine(small)
    reply = await post(gateway, prompts, **spec)
    assert reply.status_code == 400, reply.text
    assert words in reply.json()["error"]["message"]
    assert await redis.exists(EVALUATIONS) == 0
    assert not list((data_dir / "evaluations").glob("*"))


async def test_prompts_that_a_set_was_trained_on_are_refused(
    gateway: httpx.AsyncClient, stages: Stages, adapter: Path, data_dir: Path
) -> None:
    """Those of the sets that it descends from, too."""
    run = data_dir / "jobs" / "job-1" / "round-0" / "warm"
    run.mkdir(parents=True)
    (run / "pairs.jsonl").write_text('{"prompt": "what is  2?", "chosen": "a", "rejected": "b"}\n')
    policies(stages, adapter, made_by=JobRound(job="job-1", round=0))
    policies(stages, adapter, parent="demo:2", round=1)
    reply = await post(gateway)
    assert reply.status_code == 400
    assert "1 of 4 test prompts is in the training data of demo:2, such as 'What is 2?'" in reply.json()["error"]["message"]


@pytest.mark.slow
async def test_it_takes_its_turn_goes_on_with_the_next_trainer_and_shows_its_page_at_the_end(
    gateway: httpx.AsyncClient, redis: Redis, stages: Stages, tmp_path: Path
) -> None:
    asked: list[str] = []

    def sleeps(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(200, json={"state": "asleep"})

    id, log = (await post(gateway, name="Two fronts")).json()["id"], tmp_path / "log"
    async with DecoderClient("http://decoder", transport=httpx.MockTransport(sleeps)) as decoder:
        async with evaluating(redis, stages, evaluator_of(stages, log, stop=2), decoder):
            process = await waiting(log)
            assert (await EvaluationStore(redis).get(id)).state == EvaluationState.RUNNING
        assert not is_there(process)
        assert await EvaluationStore(redis).machine() == this_machine()
        assert (await gateway.get(f"/v1/evaluations/{id}")).json()["progress"] == {"stage": "answers of soup", "done": 0, "of": 4}
        assert (await gateway.get(f"/v1/evaluations/{id}/index.html")).status_code == 404
        async with evaluating(redis, stages, evaluator_of(stages, log, stop=2), decoder):
            done = await until(redis, id, EvaluationState.COMPLETED)
    assert [path for path, _ in groupby(asked)] == ["/v1/sleep", "/v1/wake"] * 2
    assert [line for line in log.read_text().splitlines() if line.startswith("batch")] == ["batch 12", "batch 4", "batch 4"]
    report = EvaluationReport.model_validate((await gateway.get(f"/v1/evaluations/{id}/report.json")).json())
    assert (report.name, [method.name for method in report.methods]) == ("Two fronts", ["base", "mod@1", "soup"])
    page = await gateway.get(f"/v1/evaluations/{id}/index.html")
    assert page.headers["content-type"].startswith("text/html") and "Two fronts" in page.text
    assert {"index.html", "report.json", "front.png", "front.svg"} <= done.artifacts.keys()
    assert (await gateway.get(f"/v1/evaluations/{id}/plan.json")).status_code == 404


@pytest.mark.slow
async def test_a_cancelled_one_ends_its_process_and_can_be_deleted(
    gateway: httpx.AsyncClient, redis: Redis, stages: Stages, tmp_path: Path, data_dir: Path
) -> None:
    id, log = (await post(gateway)).json()["id"], tmp_path / "log"
    assert (await gateway.delete(f"/v1/evaluations/{id}")).status_code == 409
    async with evaluating(redis, stages, evaluator_of(stages, log, stop=1)):
        process = await waiting(log)
        assert (await gateway.post(f"/v1/evaluations/{id}/cancel")).json()["state"] == "cancelled"
        assert (await gateway.delete(f"/v1/evaluations/{id}")).status_code == 204
        async with asyncio.timeout(PATIENCE):
            while is_there(process):  # noqa: ASYNC110, it is another process that ends
                await asyncio.sleep(0.05)
    assert not list((data_dir / "evaluations").iterdir())
    assert (await gateway.get(f"/v1/evaluations/{id}")).status_code == 404


async def test_the_oldest_goes_first_and_one_that_fails_says_why(
    gateway: httpx.AsyncClient, redis: Redis, stages: Stages, tmp_path: Path
) -> None:
    first, second = [(await post(gateway)).json()["id"] for _ in range(2)]
    script = "import sys; print('{\"error\": \"no room for ' + sys.argv[-1][-4:] + '\"}'); sys.exit(1)"
    evaluator = replace(evaluator_of(stages, tmp_path / "log"), command=(sys.executable, "-c", script))
    async with evaluating(redis, stages, evaluator):
        ended = [await until(redis, id, EvaluationState.FAILED) for id in (second, first)]
    assert [one.error for one in ended] == [f"no room for {id[-4:]}" for id in (second, first)]
    assert ended[1].updated < ended[0].updated
    assert (await gateway.post(f"/v1/evaluations/{first}/cancel")).status_code == 409
