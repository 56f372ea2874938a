"""The job endpoints and the feeder on a real queue server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from gateway.app import create_app
from gateway.jobs.feeder import Feeder
from gateway.settings import GatewaySettings
from services.common.background import end_tasks
from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobState
from services.common.contract.keys import PROMPTS, job_key
from services.common.contract.messages import Candidate, PromptDecided, PromptQueued, ScoredCandidate
from services.common.queue import Queue
from services.common.settings import Teacher
from sipo.preferences import Example
from sipo.selection import Chosen, Filter
from sipo.training.settings import TrainSettings
from support import PATIENCE
from tests.fakes import FakeDecoder, write_policy_set

CONFLICTING = {"response_0": "Short.", "response_1": "Warm, long.", "labels": {"concise": 0, "warm": 1}}
AGREEING = {"response_0": "a", "response_1": "b", "labels": {"concise": 1, "warm": 1}}


REWARD_MODELS = {"kind": "python:warm", "warm": "python:warm"}
TEACHERS = {name: Teacher(url="https://host/v1", model="m", api_key="sk-secret") for name in ("big", "bold")}


def rows(conflicting: int, agreeing: int = 0) -> list[dict[str, Any]]:
    kinds = [CONFLICTING] * conflicting + [AGREEING] * agreeing
    return [{"prompt": f"Question {i}?", **kind} for i, kind in enumerate(kinds)]


@pytest.fixture
async def gateway(tmp_path: Path, redis: Redis) -> AsyncIterator[httpx.AsyncClient]:
    """The gateway without its lifespan: tests feed by hand. "demo" has policies for concise and warm."""
    write_policy_set(tmp_path / "policies", "demo:1", ["concise", "warm"], current=True)
    decoder = httpx.AsyncClient(transport=httpx.ASGITransport(FakeDecoder().app), base_url="http://decoder")
    app = create_app(GatewaySettings(data_dir=tmp_path, reward_models=REWARD_MODELS, teachers=TEACHERS), decoder, redis)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


async def submit(gateway: httpx.AsyncClient, inputs: list[dict[str, Any]], **spec: Any) -> httpx.Response:
    return await gateway.post("/v1/jobs", json={"spec": {"policy": "demo", **spec}, "examples": inputs})


async def generating(gateway: httpx.AsyncClient, store: JobStore, inputs: list[dict[str, Any]], **spec: Any) -> Job:
    """A job as the trainer leaves it to the feeder."""
    job = Job.model_validate((await submit(gateway, inputs, **spec)).json())
    return await store.advance(job.id, JobState.QUEUED, JobState.GENERATING, sampling_set="demo:1", reward_set="demo:1")


async def queued(redis: Redis) -> list[PromptQueued]:
    return [PromptQueued.model_validate_json(fields["data"]) for _, fields in await redis.xrange(PROMPTS)]  # type: ignore[union-attr,index]


async def test_an_uploaded_file_and_inline_examples_make_the_same_job(gateway: httpx.AsyncClient, tmp_path: Path) -> None:
    inline = (await submit(gateway, rows(2, 1), weights=[{"warm": 0.3, "concise": 0.7001}])).json()
    text = "".join(json.dumps(row) + "\n" for row in rows(2, 1))
    spec = json.dumps({"policy": "demo", "weights": [{"warm": 0.3, "concise": 0.7001}]})
    reply = await gateway.post("/v1/jobs", data={"spec": spec}, files={"file": ("pairs.jsonl", text)})
    assert reply.status_code == 201, reply.text
    uploaded = reply.json()
    assert uploaded["spec"] == inline["spec"]
    assert uploaded["spec"]["objectives"] == ["concise", "warm"]
    assert sum(uploaded["spec"]["weights"][0].values()) == pytest.approx(1, abs=1e-12)
    inputs = [(tmp_path / "jobs" / job["id"] / "input.jsonl").read_text() for job in (inline, uploaded)]
    assert inputs[0] == inputs[1]
    assert [Example.model_validate_json(line).prompt for line in inputs[0].splitlines()] == [row["prompt"] for row in rows(2, 1)]


@pytest.mark.parametrize(
    ("examples", "spec", "status", "words"),
    [
        ([*rows(4), {"prompt": "x", "response_0": "a", "labels": {"concise": 1}}], {}, 400, "line 5"),
        ([*rows(1), {"prompt": "", **CONFLICTING}], {}, 400, "line 2"),
        (rows(2), {"objectives": ["concise", "polite"]}, 400, "demo:1 has policies for concise, warm"),
        (rows(2), {"policy": "new", "objectives": ["concise", "polite"]}, 400, "'polite': the labels found are concise, warm"),
        (rows(2), {"policy": "base"}, 400, "base"),
        ([{**row, "labels": {"soup": 0, "warm": 1}} for row in rows(2)], {"policy": "new"}, 400, "'soup' cannot be an objective's"),
        (rows(2), {"weights": [{"concise": 0.5, "warm": 0.9}]}, 400, "sum to 1.4"),
        (rows(2), {"review_weights": {"concise": 1}}, 400, "no weight for 'warm'"),
        (rows(0, 3), {}, 400, "0 of 3 conflict"),
        (rows(3), {"examples": "non_conflicting"}, 400, "3 of 3 conflict"),
        ([], {}, 400, "empty"),
        (rows(2), {"colour": "red"}, 400, "spec.colour"),
        (
            rows(2),
            {"filter": {"reward_models": ["safety"]}},
            400,
            "no reward model 'safety'",
        ),
        (rows(2), {"filter": {"reward_models": ["warm"]}}, 400, "'warm' is called like an objective"),
        (rows(2), {"filter": {"implicit": False}}, 400, "nothing decides: name reward_models"),
        (rows(2), {"teachers": {"gpt-9.1": 1}}, 400, "no teacher 'gpt-9.1': SIPO_TEACHERS of this system names big, bold"),
        (rows(2), {"teachers": {"big": 17}}, 400, "must be 16 or less, not 17"),
        (rows(2), {"policy": "No Name"}, 400, "spec.policy"),
        (rows(2), {"sampling_set": "demo:9"}, 400, "'demo:9' is no set of policy 'demo': its sets are demo:1"),
        (rows(2), {"sampling_set": "demo"}, 400, "'demo' is no set of policy 'demo': its sets are demo:1"),
        (rows(2), {"policy": "new", "sampling_set": "demo:1"}, 400, "'demo:1' is no set of policy 'new': its sets are none yet"),
        (rows(2), {"sampling_set": "demo:1", "objectives": ["warm", "polite"]}, 400, "demo:1 has policies for concise, warm"),
        (rows(2), {"rounds": 17}, 400, "must be 16 or less, not 17"),
        (rows(2), {"rounds": 2, "stop_after": "pairs"}, 400, "publishes no policies for a second round"),
        (rows(2), {"learning_rates": {"polite": 1e-5}}, 400, "one for 'polite': the job's objectives are concise, warm"),
        (rows(2), {"learning_rates": {"warm": 0}}, 400, "must be more than 0, not 0"),
        (rows(2), {"alignment": {"alpha": 0.1}}, 400, "a first alignment (Eq. 2) has none"),
        (rows(2), {"sft": {}}, 400, "the policies of 'demo' have their reference already"),
        (rows(2), {"policy": "new", "sft": {"beta": 0.2}}, 400, "sft sets beta: fine-tuning has no pairs, leave it out"),
    ],
)
async def test_a_job_that_cannot_work_is_refused_and_leaves_nothing(
    gateway: httpx.AsyncClient, tmp_path: Path, examples: list[dict[str, Any]], spec: dict[str, Any], status: int, words: str
) -> None:
    reply = await submit(gateway, examples, **spec)
    assert reply.status_code == status, reply.text
    assert words in reply.json()["error"]["message"]
    assert (await gateway.get("/v1/jobs")).json()["data"] == []
    assert not list((tmp_path / "jobs").glob("*"))


@pytest.mark.parametrize("alignment", [{}, {"epochs": 1}, TrainSettings(alpha=0).model_dump()])
async def test_a_first_alignment_has_no_alpha(gateway: httpx.AsyncClient, alignment: dict[str, Any]) -> None:
    reply = await submit(gateway, rows(2), alignment=alignment)
    assert reply.status_code == 201, reply.text
    assert reply.json()["spec"]["alignment"]["alpha"] == 0


async def test_a_policy_without_a_current_set_may_be_started_from_a_version(gateway: httpx.AsyncClient, tmp_path: Path) -> None:
    write_policy_set(tmp_path / "policies", "draft:1", ["concise", "warm"])
    refused = await submit(gateway, rows(2), policy="draft")
    assert refused.status_code == 409 and "name one as `sampling_set`" in refused.json()["error"]["message"]
    taken = await submit(gateway, rows(2), policy="draft", sampling_set="draft:1", rounds=2)
    assert taken.status_code == 201, taken.text
    assert (taken.json()["round"], taken.json()["spec"]["rounds"]) == (1, 2)


async def test_a_form_needs_spec_and_file(gateway: httpx.AsyncClient) -> None:
    spec, file = {"spec": '{"policy": "demo"}'}, ("rows.jsonl", json.dumps({"prompt": "x", **CONFLICTING}))
    for content, param, words in (
        ({"files": {"file": file}}, "spec", "the form needs a field `spec`"),
        ({"data": spec | {"file": file[1]}, "files": {"x": file}}, "file", "'file' is a text: data comes as a file"),
        ({"data": {"spec": "{}"}, "files": {"file": file}}, "spec.policy", "`spec.policy` is missing"),
        ({"files": {"spec": ("s.json", "{}")}}, "file", "the form needs a file `file`"),
        ({"data": spec, "files": {"other": file}}, None, "labelled data names its objectives itself"),
    ):
        reply = await gateway.post("/v1/jobs", **content)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
        assert words in reply.json()["error"]["message"]
    for body in (b"{", b'{"prompt": 1}\n{"prompt": 2}\n', b"spec=x"):
        reply = await gateway.post("/v1/jobs", content=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")
        assert "or a form (multipart/form-data) with the field `spec`" in reply.json()["error"]["message"]


async def test_a_store_that_refuses_the_job_leaves_no_input(
    gateway: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_args: Any, **_fields: Any) -> Job:
        raise ConnectionError("the queue server went away")

    monkeypatch.setattr(JobStore, "create", refuse)
    assert (await submit(gateway, rows(2))).status_code == 500
    assert not list((tmp_path / "jobs").glob("*"))


async def test_a_job_is_listed_shown_and_cancelled(gateway: httpx.AsyncClient) -> None:
    first, second = [(await submit(gateway, rows(1))).json()["id"] for _ in range(2)]
    assert [job["id"] for job in (await gateway.get("/v1/jobs")).json()["data"]] == [second, first]
    assert (await gateway.get(f"/v1/jobs/{first}")).json()["state"] == "queued"
    assert (await gateway.post(f"/v1/jobs/{first}/cancel")).json()["state"] == "cancelled"
    assert (await gateway.get(f"/v1/jobs/{first}")).json()["state"] == "cancelled"
    assert (await gateway.get("/v1/jobs/nobody")).status_code == 404
    assert (await gateway.post("/v1/jobs/nobody/cancel")).status_code == 404
    assert (await gateway.get("/v1/jobs/nobody/pairs")).status_code == 404


async def test_a_job_of_another_release_is_a_conflict_and_hides_no_other(gateway: httpx.AsyncClient, redis: Redis) -> None:
    theirs, ours = [(await submit(gateway, rows(1))).json() for _ in range(2)]
    assert (theirs["version"], ours["version"]) == (1, 1)
    await redis.hset(job_key(theirs["id"]), "version", "2")
    for reply in (await gateway.get(f"/v1/jobs/{theirs['id']}"), await gateway.post(f"/v1/jobs/{theirs['id']}/cancel")):
        assert reply.status_code == 409
        assert f"Job {theirs['id']} was written by another release" in reply.json()["error"]["message"]
    assert (await gateway.get("/v1/jobs")).json()["data"] == [ours]


async def test_pairs_and_candidates_are_those_decided_so_far(gateway: httpx.AsyncClient, tmp_path: Path) -> None:
    job = (await submit(gateway, rows(2))).json()["id"]
    assert (await gateway.get(f"/v1/jobs/{job}/pairs")).text == ""
    weights = {"concise": 0.5, "warm": 0.5}
    candidate = Candidate(text="Both.", token_ids=[1], finish_reason="stop", weights=weights, stage="sample")
    examples = [Example.model_validate(row) for row in rows(2)]
    accepted = PromptDecided(
        job=job,
        round=1,
        prompt="0",
        outcome="accepted",
        example=examples[0],
        chosen=[Chosen(candidate=0)],
        candidates=[ScoredCandidate(candidate=candidate, rewards={"concise": 1.0}, rejected=None)],
    )
    none = PromptDecided(job=job, round=1, prompt="1", outcome="none", example=examples[1])
    later = accepted.model_copy(update={"round": 2, "prompt": "1", "example": examples[1]})
    lines = [decision.model_dump_json() for decision in (accepted, none, later)]
    half_written = lines[0][:40]
    (tmp_path / "jobs" / job / "decisions.jsonl").write_text("\n".join([*lines, half_written]))

    candidates = (await gateway.get(f"/v1/jobs/{job}/candidates")).text.splitlines()
    assert [PromptDecided.model_validate_json(line) for line in candidates] == [accepted, none, later]
    pairs = [json.loads(line) for line in (await gateway.get(f"/v1/jobs/{job}/pairs")).text.splitlines()]
    assert pairs == [
        {"prompt": "Question 0?", "chosen": "Both.", "rejected": "Short.", "round": 1},
        {"prompt": "Question 0?", "chosen": "Both.", "rejected": "Warm, long.", "round": 1},
        {"prompt": "Question 1?", "chosen": "Both.", "rejected": "Short.", "round": 2},
        {"prompt": "Question 1?", "chosen": "Both.", "rejected": "Warm, long.", "round": 2},
    ]


async def test_the_report_is_there_once_it_is_written(gateway: httpx.AsyncClient, tmp_path: Path) -> None:
    job = (await submit(gateway, rows(1))).json()["id"]
    assert (await gateway.get(f"/v1/jobs/{job}/report")).status_code == 404
    (tmp_path / "jobs" / job / "report.json").write_text('{"accepted": 1}')
    assert (await gateway.get(f"/v1/jobs/{job}/report")).json() == {"accepted": 1}


async def test_so_is_its_page(gateway: httpx.AsyncClient, tmp_path: Path) -> None:
    job = (await submit(gateway, rows(1))).json()["id"]
    missing = await gateway.get(f"/v1/jobs/{job}/report.html")
    assert (missing.status_code, missing.json()["error"]["message"]) == (
        404,
        f"{job} has no page yet: it is written when every prompt of the first round is decided",
    )
    (tmp_path / "jobs" / job / "report.html").write_text("<h1>A job</h1>")
    page = await gateway.get(f"/v1/jobs/{job}/report.html")
    assert (page.headers["content-type"].partition(";")[0], page.text) == ("text/html", "<h1>A job</h1>")


async def test_the_feeder_queues_the_chosen_rows_with_the_jobs_plan(
    gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path
) -> None:
    store = JobStore(redis)
    examples = [*rows(1, 2), {"prompt": "Last?", **CONFLICTING}]
    by = {"margin": 0.1, "reward_models": ["kind"]}
    weights, teachers = {"concise": 1, "warm": 0}, {"big": 2}
    job = await generating(gateway, store, examples, seed=7, review_weights=weights, filter=by, teachers=teachers)
    await Feeder(Queue(redis), store, tmp_path / "jobs").top_up()
    messages = await queued(redis)
    assert [(m.id, m.example.prompt) for m in messages] == [(f"{job.id}/1/0", "Question 0?"), (f"{job.id}/1/3", "Last?")]
    plan = messages[0].plan
    assert (plan.sampling_set, plan.reward_set, plan.seed, len(plan.weights)) == ("demo:1", "demo:1", 7, 4)
    assert (plan.review_weights, plan.teachers) == (weights, teachers)
    assert plan.filter == Filter(margin=0.1, reward_models=["kind"])
    fed = await store.get(job.id)
    assert (fed.total, fed.counts.queued) == (2, 2)


async def test_jobs_take_turns_and_the_rest_waits_for_room(gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path) -> None:
    store = JobStore(redis)
    jobs = [await generating(gateway, store, rows(5)) for _ in range(2)]
    feeder = Feeder(Queue(redis, capacity=4), store, tmp_path / "jobs")
    await feeder.top_up()
    assert sorted(m.job for m in await queued(redis)) == sorted(2 * [job.id for job in jobs])
    await redis.xtrim(PROMPTS, maxlen=0)
    await feeder.top_up()
    assert [(await store.get(job.id)).counts.queued for job in jobs] == [4, 4]


async def test_two_feeders_queue_each_prompt_exactly_once(gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path) -> None:
    store = JobStore(redis)
    jobs = [await generating(gateway, store, rows(40)) for _ in range(3)]
    feeders = [Feeder(Queue(redis), store, tmp_path / "jobs", pause=0.01) for _ in range(2)]
    running = [asyncio.create_task(feeder.run()) for feeder in feeders]
    async with asyncio.timeout(PATIENCE):
        while sum([(await store.get(job.id)).counts.queued for job in jobs]) < 120:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
    await end_tasks(*running)
    expected = sorted(f"{job.id}/1/{row}" for job in jobs for row in range(40))
    assert sorted(m.id for m in await queued(redis)) == expected


async def test_a_cancelled_job_is_fed_no_more(gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path) -> None:
    store = JobStore(redis)
    job = await generating(gateway, store, rows(6))
    feeder = Feeder(Queue(redis, capacity=2), store, tmp_path / "jobs")
    await feeder.top_up()
    await gateway.post(f"/v1/jobs/{job.id}/cancel")
    await redis.xtrim(PROMPTS, maxlen=0)
    await feeder.top_up()
    assert await queued(redis) == []


async def test_a_job_whose_input_is_gone_fails_with_the_reason(gateway: httpx.AsyncClient, redis: Redis, tmp_path: Path) -> None:
    store = JobStore(redis)
    job = await generating(gateway, store, rows(1))
    (tmp_path / "jobs" / job.id / "input.jsonl").unlink()
    await Feeder(Queue(redis), store, tmp_path / "jobs").top_up()
    failed = await store.get(job.id)
    assert failed.state == JobState.FAILED
    assert "input.jsonl" in (failed.error or "")


async def test_a_file_of_pairs_for_each_objective_makes_a_job(gateway: httpx.AsyncClient, tmp_path: Path) -> None:
    def pairs(*rows: tuple[str, str, str]) -> str:
        return "".join(json.dumps({"prompt": x, "chosen": chosen, "rejected": rejected}) + "\n" for x, chosen, rejected in rows)

    files = [
        ("helpful", ("a.jsonl", pairs(("x", "a", "b"), ("y", "c", "d")))),
        ("harmless", ("b.jsonl", pairs(("x", "b", "a"), ("z", "", "f")))),
    ]
    reply = await gateway.post("/v1/jobs", data={"spec": '{"policy": "new"}'}, files=files)
    assert reply.status_code == 201, reply.text
    job = reply.json()
    assert job["spec"]["objectives"] == ["helpful", "harmless"]
    stored = (tmp_path / "jobs" / job["id"] / "input.jsonl").read_text().splitlines()
    assert [Example.model_validate_json(line).labels for line in stored] == [
        {"helpful": 0, "harmless": 1},
        {"helpful": 0},
        {"harmless": 0},
    ]
    assert job["notes"] == [
        "2 of 3 rows not sampled, as only those that conflict on helpful, harmless are: examples is conflicting",
        "2 of 3 rows have a label for one objective only, and cannot conflict",
        "harmless: in 1 of 2 pairs the preferred response is empty",
    ]


async def test_what_will_be_left_out_of_a_job_is_counted_when_it_is_posted(gateway: httpx.AsyncClient) -> None:
    long = {"prompt": "word " * 300, **CONFLICTING}
    refused = await submit(gateway, [long])
    assert refused.status_code == 400
    assert "every prompt is too long for training.max_prompt_tokens = 256: the shortest has 3" in refused.json()["error"]["message"]
    job = (await submit(gateway, [*rows(3, 1), long, {**long, "split": "test"}], max_prompts=4, max_tokens=3900)).json()
    assert [note for note in job["notes"] if not note.startswith("a rewrite may need")] == [
        "left out: rows whose `split` holds them out of training (1)",
        "1 of 5 rows not sampled, as only those that conflict on concise, warm are: examples is conflicting",
        "1 of 4 prompts too long for training.max_prompt_tokens = 256: sampled, but not trained on",
        "1 of 4 prompts too long for max_tokens = 3900 to follow within SIPO_DECODER_MAX_MODEL_LEN = 4096: bound to fail",
    ]
    aligned = (await submit(gateway, [*rows(3), long], policy="new", max_prompts=2)).json()
    assert aligned["notes"] == [
        "only the first 2 of 4 prompts sampled: max_prompts is 2",
        "1 of 4 prompts too long for alignment.max_prompt_tokens = 256: not trained on in the first alignment",
    ]
    tuned = (await submit(gateway, [*rows(3), long], policy="new", sft={"max_prompt_tokens": 250})).json()
    assert tuned["notes"][0] == "1 of 4 prompts too long for sft.max_prompt_tokens = 250: not fine-tuned on"
    pairs_only = (await submit(gateway, [long, *rows(1)], stop_after="pairs")).json()
    assert pairs_only["notes"] == []


async def test_more_objectives_than_the_decoder_can_mix_are_refused_at_once(gateway: httpx.AsyncClient, tmp_path: Path) -> None:
    three = [{**row, "labels": {"a": 0, "b": 1, "c": 1}} for row in rows(2)]
    refused = await submit(gateway, three, policy="new")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "objectives")
    assert "SIPO_DECODER_SLOTS=3" in refused.json()["error"]["message"]
    assert not list((tmp_path / "jobs").glob("*"))
    taken = await submit(gateway, three, policy="new", mode="soup")
    assert taken.status_code == 201, taken.text
