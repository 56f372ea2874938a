"""The whole system, as `sipo up` starts it: the real small model, the real queue server, real training, and kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from services.common.local.processes import free_ports
from sipo.datasets import bundled_examples
from sipo.policies import PolicyStore
from support import PATIENCE

pytestmark = pytest.mark.slow

START = 300.0
"""Seconds that the system may take to start on a busy machine."""
PROMPTS = 5
"""Of the killed round: enough that there is always work in hand when something is killed, and that some give pairs."""


class Stack:
    """A running system: its data folder, its gateway, and its processes by the module that they run."""

    def __init__(self, data_dir: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused")
        self.process = process

    def pid(self, module: str) -> int | None:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.cmdline()[-2:] == ["-m", module]:
                    return child.pid
            except psutil.Error:
                continue
        return None

    def kill(self, module: str) -> None:
        pid = self.pid(module)
        assert pid is not None, f"{module} does not run"
        os.kill(pid, signal.SIGKILL)

    def job(self, job: str) -> dict[str, Any]:
        reply = self.http.get(f"/v1/jobs/{job}")
        reply.raise_for_status()
        found: dict[str, Any] = reply.json()
        return found

    def until(self, job: str, reached: Callable[[dict[str, Any]], bool], timeout: float = 420) -> dict[str, Any]:
        """Polls the job until it has `reached` something; fails at once if it ended otherwise."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.job(job)
            if reached(found):
                return found
            assert found["state"] not in ("failed", "cancelled", "completed"), found
            time.sleep(0.2)
        raise AssertionError(f"not reached within {timeout} s: {found}")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data_dir = tmp_path_factory.mktemp("stack")
    env = os.environ | {"SIPO_DATA_DIR": str(data_dir)}
    (port,) = free_ports(1)
    process = subprocess.Popen([Path(sys.executable).with_name("sipo"), "up", "--port", str(port)], env=env)
    stack = Stack(data_dir, port, process)
    try:
        deadline = time.monotonic() + START
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if stack.http.get("/ready").is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        else:
            pytest.fail("the system did not start")
        yield stack
    finally:
        stack.http.close()
        stack.openai.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert not [child for child in psutil.process_iter(["environ"]) if _ours(child, data_dir)], "a process was left behind"


def _ours(process: psutil.Process, data_dir: Path) -> bool:
    return (process.info["environ"] or {}).get("SIPO_DATA_DIR") == str(data_dir)


def test_kill_9_in_every_stage_loses_no_prompt_and_doubles_no_pair(stack: Stack) -> None:
    examples = [example for example in bundled_examples("train") if example.conflicting()][:PROMPTS]
    # Short answers, which need not have ended: what is killed here is the same.
    spec = {"policy": "demo", "max_tokens": 24, "review_max_tokens": 12, "filter": {"keep_truncated": True}, "activate": True}
    body = {"spec": spec, "examples": [example.model_dump() for example in examples]}
    reply = stack.http.post("/v1/jobs", json=body)
    assert reply.status_code == 201, reply.text
    job = reply.json()["id"]

    # Each is killed while it holds work that is not handed on yet.
    stack.until(job, lambda j: j["counts"]["sampled"] >= 1)
    stack.kill("gateway.worker")
    stack.until(job, lambda j: j["counts"]["sampled"] > j["counts"]["decided"])
    stack.kill("services.scorer")
    stack.until(job, lambda j: 1 <= j["counts"]["decided"] < PROMPTS)
    stack.kill("services.trainer")
    stack.until(job, lambda j: j["state"] == "training" and bool(j["progress"]))
    stack.kill("services.trainer")
    done = stack.until(job, lambda j: j["state"] == "completed")

    decisions = [json.loads(line) for line in stack.http.get(f"/v1/jobs/{job}/candidates").text.splitlines()]
    assert sorted(int(decision["prompt"]) for decision in decisions) == list(range(PROMPTS))
    assert done["counts"]["decided"] == PROMPTS
    assert done["counts"]["failed"] == 0
    accepted = [decision for decision in decisions if decision["outcome"] == "accepted"]
    pairs = [json.loads(line) for line in stack.http.get(f"/v1/jobs/{job}/pairs").text.splitlines()]
    assert len(pairs) == 2 * len(accepted) > 0
    assert len({json.dumps(pair) for pair in pairs}) == len(pairs)

    store = PolicyStore(stack.data_dir / "policies")
    assert [policy_set.id for policy_set in store.sets()] == ["demo:1", "demo:2"], "published once, whatever was killed"
    assert done["policy_set"] == store.get("demo").id == "demo:2"
    assert store.get("demo").manifest.parent == "demo:1"


def test_openais_client_gets_an_answer_at_each_weight_from_the_current_set(stack: Stack) -> None:
    current = PolicyStore(stack.data_dir / "policies").get("demo")
    client = stack.openai
    answers = {}
    for concise in (0.0, 0.3, 1.0):
        weights = {"concise": concise, "warm": 1 - concise}
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "My cat died. What can I do with the pain?"}],
            max_tokens=40,
            temperature=0,
            extra_body={"preference_weights": weights},
        )
        echoed = answer.model_dump()
        assert echoed["policy_set"] == current.id
        assert echoed["preference_weights"] == pytest.approx(weights)
        answers[concise] = answer.choices[0].message.content
    assert all(answers.values())
    assert len(set(answers.values())) > 1, "the weight must matter"


def test_a_stream_says_the_same_as_the_whole_answer(stack: Stack) -> None:
    client = stack.openai
    request: dict[str, Any] = {
        "model": "demo@concise=0.5,warm=0.5",
        "messages": [{"role": "user", "content": "Name three fruits."}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request).choices[0].message.content
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert all(chunk.model_dump()["policy_set"].startswith("demo:") for chunk in chunks)
