"""The commands that talk to a gateway, against a real one with a fake decoder behind it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner, Result

from gateway.cli import app
from services.common.contract.job_store import JobStore
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.messages import PromptDecided
from sipo.policies import PolicyStore
from sipo.preferences import Example
from sipo.training.presets import read_preset
from tests.fakes import FakeDecoder, write_policy_set

pytestmark = pytest.mark.slow


def sipo(url: str, *args: str) -> Result:
    return CliRunner().invoke(app, args, env={"SIPO_GATEWAY_URL": url})


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    row = {"response_0": "a", "response_1": "b", "labels": {"concise": 0, "warm": 1}}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", **row}) + "\n" for i in range(3)))
    return path


def test_generate_streams_the_answer_of_the_only_policy(gateway_url: str, decoder: FakeDecoder) -> None:
    result = sipo(gateway_url, "generate", "-w", "concise=0.7,warm=0.3", "How do I boil an egg?")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == decoder.answer
    assert "demo:1 at concise=0.7,warm=0.3" in result.stderr
    assert decoder.bodies[0]["stream"] is True
    assert decoder.bodies[0]["preference_weights"] == pytest.approx({"concise": 0.7, "warm": 0.3})


def test_generate_reads_the_prompt_from_standard_input_and_passes_the_mode_on(gateway_url: str, decoder: FakeDecoder) -> None:
    env = {"SIPO_GATEWAY_URL": gateway_url}
    result = CliRunner().invoke(app, ["generate", "--mode", "soup", "-"], env=env, input="How do I\nboil an egg?\n")
    assert result.exit_code == 0, result.output
    assert decoder.bodies[0]["mode"] == "soup"
    assert decoder.bodies[0]["messages"] == [{"role": "user", "content": "How do I\nboil an egg?"}]
    empty = CliRunner().invoke(app, ["generate", "-"], env=env, input="\n")
    assert (empty.exit_code, empty.stdout, len(decoder.bodies)) == (2, "", 1)
    assert "the prompt is empty" in empty.stderr


def test_control_characters_of_an_answer_are_left_out(gateway_url: str, decoder: FakeDecoder) -> None:
    decoder.answer = "red \x1b[31malert\x07"
    assert sipo(gateway_url, "generate", "How?").stdout.strip() == "red [31malert"


def test_generate_tells_a_wrong_weight_in_one_sentence(gateway_url: str) -> None:
    result = sipo(gateway_url, "generate", "-w", "concise=0.7,warm=0.7", "How?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "sum to 1.4" in result.stderr


def test_generate_names_the_models_when_there_are_several(gateway_url: str, tmp_path: Path) -> None:
    write_policy_set(tmp_path / "policies", "other:1", ["concise", "warm"], current=True)
    result = sipo(gateway_url, "generate", "How?")
    assert result.exit_code == 2
    assert "demo, other" in result.stderr


def test_a_job_is_submitted_listed_shown_and_cancelled(gateway_url: str, pairs: Path) -> None:
    submitted = sipo(gateway_url, "jobs", "submit", str(pairs), "--policy", "demo", "--max-prompts", "2", "--stop-after-pairs")
    assert submitted.exit_code == 0, submitted.output
    job = submitted.stdout.strip()
    assert job in sipo(gateway_url, "jobs", "list").stdout
    shown = json.loads(sipo(gateway_url, "jobs", "show", job).stdout)
    assert (shown["state"], shown["spec"]["max_prompts"], shown["spec"]["stop_after"]) == ("queued", 2, "pairs")
    assert "cancelled" in sipo(gateway_url, "jobs", "cancel", job).stdout
    watched = sipo(gateway_url, "jobs", "watch", job)
    assert watched.exit_code == 1
    assert "cancelled" in watched.stdout


def test_what_a_job_left_is_written_and_then_deleted(gateway_url: str, pairs: Path, tmp_path: Path) -> None:
    job = sipo(gateway_url, "jobs", "submit", str(pairs), "--policy", "demo", "--stop-after-pairs").stdout.strip()
    running = sipo(gateway_url, "jobs", "delete", job)
    assert (running.exit_code, running.stderr) == (1, f"error: job {job} is queued: cancel it first\n")
    sipo(gateway_url, "jobs", "cancel", job)
    folder = tmp_path / "jobs" / job
    decision = PromptDecided(
        job=job,
        round=1,
        prompt="0",
        outcome="none",
        example=Example(prompt="0?", response_0="a", response_1="b", labels={"concise": 0, "warm": 1}),
    )
    (folder / "decisions.jsonl").write_text(decision.model_dump_json() + "\n")
    shown = sipo(gateway_url, "jobs", "candidates", job)
    assert (shown.exit_code, json.loads(shown.stdout)["prompt"]) == (0, "0")
    assert sipo(gateway_url, "jobs", "pairs", job).exit_code == 0
    out = tmp_path / "candidates.jsonl"
    assert sipo(gateway_url, "jobs", "candidates", job, "--out", str(out)).stdout == ""
    assert out.read_text() == shown.stdout
    nowhere = sipo(gateway_url, "jobs", "pairs", job, "--out", str(tmp_path / "missing" / "pairs.jsonl"))
    assert nowhere.exit_code == 2 and "there is no folder" in nowhere.stderr
    early = sipo(gateway_url, "jobs", "report", job, "--out", str(tmp_path / "report.json"))
    assert early.exit_code == 2 and "has no report yet" in early.stderr
    assert [path.name for path in tmp_path.glob("*report*")] == []

    assert sipo(gateway_url, "jobs", "delete", job).stdout == f"{job} is deleted\n"
    assert not folder.exists()
    for command in ("delete", "show", "pairs"):
        gone = sipo(gateway_url, "jobs", command, job)
        assert (gone.exit_code, gone.stderr) == (2, f"error: no job '{job}'\n")


async def test_a_finished_job_says_whether_its_set_is_current(gateway_url: str, redis: Redis, tmp_path: Path) -> None:
    write_policy_set(tmp_path / "policies", "demo:2", ["concise", "warm"])
    store = JobStore(redis)
    job = await store.create(JobSpec(policy="demo"))
    await store.advance(job.id, JobState.QUEUED, JobState.GENERATING)
    await store.advance(job.id, JobState.GENERATING, JobState.COMPLETED, policy_set="demo:2")
    watched = await asyncio.to_thread(sipo, gateway_url, "jobs", "watch", job.id)
    assert watched.stdout.splitlines()[-2:] == [
        f"{job.id} completed: demo:2",
        "demo:2 is not current: `sipo policies activate demo:2` makes it so",
    ]
    PolicyStore(tmp_path / "policies").activate("demo:2")
    watched = await asyncio.to_thread(sipo, gateway_url, "jobs", "watch", job.id)
    assert watched.stdout.splitlines()[-1] == "demo:2 is current"


def test_a_field_that_is_misspelt_is_told_with_the_one_that_was_meant(gateway_url: str, pairs: Path, tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("polcy: demo\n")
    result = sipo(gateway_url, "jobs", "submit", str(pairs), "--spec", str(spec))
    assert (result.exit_code, result.stderr) == (2, "error: `polcy` is no known field: did you mean `policy`?\n")
    reply = httpx.post(f"{gateway_url}/v1/jobs", json={"spec": {"policy": "demo", "round": 2}, "examples": []})
    assert reply.json()["error"]["param"] == "spec.round"
    assert "`spec.round` is no known field: did you mean `rounds`?" in reply.json()["error"]["message"]


def test_a_specification_file_is_overridden_by_options(gateway_url: str, pairs: Path, tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("policy: demo\nseed: 5\nmax_prompts: 1\ntraining: {epochs: 2}\n")
    job = sipo(gateway_url, "jobs", "submit", str(pairs), "--spec", str(spec), "--max-prompts", "3").stdout.strip()
    shown = json.loads(sipo(gateway_url, "jobs", "show", job).stdout)["spec"]
    assert (shown["seed"], shown["max_prompts"], shown["training"]["epochs"]) == (5, 3, 2)


def test_a_preset_gives_the_training_settings_that_the_specification_does_not(
    gateway_url: str, pairs: Path, tmp_path: Path
) -> None:
    pairs.write_text(pairs.read_text().replace("concise", "helpful").replace("warm", "harmless"))
    spec = tmp_path / "job.yaml"

    def submitted(text: str) -> dict[str, Any]:
        spec.write_text(f"policy: new\n{text}")
        result = sipo(gateway_url, "jobs", "submit", str(pairs), "--preset", "beavertails", "--spec", str(spec))
        assert result.exit_code == 0, result.output
        shown: dict[str, Any] = json.loads(sipo(gateway_url, "jobs", "show", result.stdout.strip()).stdout)["spec"]
        return shown

    shown = submitted("training: {epochs: 2}\nalignment: {batch_size: 4}\n")
    assert [shown["training"][name] for name in ("epochs", "learning_rate", "max_prompt_tokens", "alpha")] == [2, 5e-6, 512, 0.1]
    assert [shown["alignment"][name] for name in ("epochs", "batch_size", "lora_rank", "alpha")] == [3, 4, 64, 0]
    assert shown["learning_rates"] == {"harmless": 5e-5}
    assert submitted("training: {learning_rate: 1.0e-6}\n")["learning_rates"] == {}
    assert submitted("learning_rates: {helpful: 1.0e-6}\n")["learning_rates"] == {"helpful": 1e-6}
    assert shown["sft"] is None
    tuned = submitted("sft: {epochs: 1}\n")["sft"]
    assert (tuned["epochs"], tuned["learning_rate"], tuned["max_prompt_tokens"]) == (1, 1e-4, 2048)


def test_a_fine_tuning_has_the_presets_settings(gateway_url: str, pairs: Path, tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("policy: new\nsft: {seed: 5}\n")
    job = sipo(gateway_url, "jobs", "submit", str(pairs), "--sft", "--spec", str(spec)).stdout.strip()
    shown = json.loads(sipo(gateway_url, "jobs", "show", job).stdout)["spec"]["sft"]
    assert shown == read_preset("small").sft.model_copy(update={"seed": 5}).model_dump(mode="json")


def test_a_preset_that_does_not_fit_is_refused(gateway_url: str, pairs: Path) -> None:
    for preset, words in (("beavertails", "'harmless': the job's objectives are concise"), ("large", "there are beavertails")):
        result = sipo(gateway_url, "jobs", "submit", str(pairs), "--policy", "demo", "--preset", preset)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr


def test_a_bad_line_is_named_and_no_job_is_made(gateway_url: str, pairs: Path) -> None:
    with pairs.open("a") as file:
        file.write("{}\n")
    result = sipo(gateway_url, "jobs", "submit", str(pairs), "--policy", "demo")
    assert result.exit_code == 2
    assert "line 4" in result.stderr
    assert "no jobs yet" in sipo(gateway_url, "jobs", "list").stdout


def test_without_a_gateway_every_command_says_how_to_start_one() -> None:
    for command in (["generate", "How?"], ["jobs", "list"], ["jobs", "show", "x"]):
        result = sipo("http://127.0.0.1:9", *command)
        assert result.exit_code == 1
        assert "sipo up" in result.stderr
        assert "Traceback" not in result.output
