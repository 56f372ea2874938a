"""The commands that talk to a gateway, against a real one with a fake decoder behind it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from redis.asyncio import Redis
from typer.testing import CliRunner, Result

from gateway.app import create_app
from gateway.cli import app
from gateway.settings import GatewaySettings
from services.common.queue import connect
from tests.fakes import FakeDecoder, write_policy_set


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def url(tmp_path: Path, redis_url: str, redis: Redis, decoder: FakeDecoder) -> Iterator[str]:
    """A gateway in a thread of its own: the commands block."""
    write_policy_set(tmp_path / "policies", "demo:1", ["concise", "warm"], current=True)
    upstream = httpx.AsyncClient(transport=httpx.ASGITransport(decoder.app), base_url="http://decoder")
    gateway = create_app(GatewaySettings(data_dir=tmp_path), upstream, connect(redis_url))
    server = uvicorn.Server(uvicorn.Config(gateway, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def sipo(url: str, *args: str) -> Result:
    return CliRunner().invoke(app, args, env={"SIPO_GATEWAY_URL": url})


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    row = {"response_0": "a", "response_1": "b", "labels": {"concise": 0, "warm": 1}}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", **row}) + "\n" for i in range(3)))
    return path


def test_generate_streams_the_answer_of_the_only_policy(url: str, decoder: FakeDecoder) -> None:
    result = sipo(url, "generate", "-w", "concise=0.7,warm=0.3", "How do I boil an egg?")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == decoder.answer
    assert "demo:1 at concise=0.7,warm=0.3" in result.stderr
    assert decoder.bodies[0]["stream"] is True
    assert decoder.bodies[0]["preference_weights"] == pytest.approx({"concise": 0.7, "warm": 0.3})


def test_generate_tells_a_wrong_weight_in_one_sentence(url: str) -> None:
    result = sipo(url, "generate", "-w", "concise=0.7,warm=0.7", "How?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "sum to 1.4" in result.stderr


def test_generate_names_the_models_when_there_are_several(url: str, tmp_path: Path) -> None:
    write_policy_set(tmp_path / "policies", "other:1", ["concise", "warm"], current=True)
    result = sipo(url, "generate", "How?")
    assert result.exit_code == 2
    assert "demo, other" in result.stderr


def test_a_job_is_submitted_listed_shown_and_cancelled(url: str, pairs: Path) -> None:
    submitted = sipo(url, "jobs", "submit", str(pairs), "--policy", "demo", "--max-prompts", "2", "--stop-after-pairs")
    assert submitted.exit_code == 0, submitted.output
    job = submitted.stdout.strip()
    assert job in sipo(url, "jobs", "list").stdout
    shown = json.loads(sipo(url, "jobs", "show", job).stdout)
    assert (shown["state"], shown["spec"]["max_prompts"], shown["spec"]["stop_after"]) == ("queued", 2, "pairs")
    assert "cancelled" in sipo(url, "jobs", "cancel", job).stdout
    watched = sipo(url, "jobs", "watch", job)
    assert watched.exit_code == 1
    assert "cancelled" in watched.stdout


def test_a_specification_file_is_overridden_by_options(url: str, pairs: Path, tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("policy: demo\nseed: 5\nmax_prompts: 1\ntraining: {epochs: 2}\n")
    job = sipo(url, "jobs", "submit", str(pairs), "--spec", str(spec), "--max-prompts", "3").stdout.strip()
    shown = json.loads(sipo(url, "jobs", "show", job).stdout)["spec"]
    assert (shown["seed"], shown["max_prompts"], shown["training"]["epochs"]) == (5, 3, 2)


def test_a_preset_gives_the_training_settings_that_the_specification_does_not(url: str, pairs: Path, tmp_path: Path) -> None:
    pairs.write_text(pairs.read_text().replace("concise", "helpful").replace("warm", "harmless"))
    spec = tmp_path / "job.yaml"

    def submitted(text: str) -> dict[str, Any]:
        spec.write_text(f"policy: new\n{text}")
        result = sipo(url, "jobs", "submit", str(pairs), "--preset", "beavertails", "--spec", str(spec))
        assert result.exit_code == 0, result.output
        shown: dict[str, Any] = json.loads(sipo(url, "jobs", "show", result.stdout.strip()).stdout)["spec"]
        return shown

    shown = submitted("training: {epochs: 2}\nalignment: {batch_size: 4}\n")
    assert [shown["training"][name] for name in ("epochs", "learning_rate", "max_prompt_tokens", "alpha")] == [2, 5e-6, 512, 0.1]
    assert [shown["alignment"][name] for name in ("epochs", "batch_size", "lora_rank", "alpha")] == [3, 4, 64, 0]
    assert shown["learning_rates"] == {"harmless": 5e-5}
    assert submitted("training: {learning_rate: 1.0e-6}\n")["learning_rates"] == {}
    assert submitted("learning_rates: {helpful: 1.0e-6}\n")["learning_rates"] == {"helpful": 1e-6}


def test_a_preset_that_does_not_fit_is_refused(url: str, pairs: Path) -> None:
    for preset, words in (("beavertails", "'harmless': the job's objectives are concise"), ("large", "there are beavertails")):
        result = sipo(url, "jobs", "submit", str(pairs), "--policy", "demo", "--preset", preset)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr


def test_a_bad_line_is_named_and_no_job_is_made(url: str, pairs: Path) -> None:
    with pairs.open("a") as file:
        file.write("{}\n")
    result = sipo(url, "jobs", "submit", str(pairs), "--policy", "demo")
    assert result.exit_code == 2
    assert "line 4" in result.stderr
    assert "no jobs yet" in sipo(url, "jobs", "list").stdout


def test_without_a_gateway_every_command_says_how_to_start_one() -> None:
    for command in (["generate", "How?"], ["jobs", "list"], ["jobs", "show", "x"]):
        result = sipo("http://127.0.0.1:9", *command)
        assert result.exit_code == 1
        assert "sipo up" in result.stderr
        assert "Traceback" not in result.output
