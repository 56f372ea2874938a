"""The supervisor with real, small processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.common.local import supervisor
from services.common.local.processes import free_ports
from services.common.local.stack import stack_specs
from services.common.local.supervisor import ProcessFailed, ProcessSpec, Supervisor
from services.common.queue import connect
from services.common.settings import CommonSettings
from sipo.errors import Conflict
from support import PATIENCE

pytestmark = pytest.mark.slow

WEB = """
import http.server, sys, time
port, delay = int(sys.argv[1]), float(sys.argv[2])
time.sleep(delay)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""
NOTES = """
import signal, sys, time
notes, name = open(sys.argv[1], "a", buffering=1), sys.argv[2]
def end(*_):
    time.sleep(0.2); notes.write(name + " out\\n"); sys.exit(0)
signal.signal(signal.SIGTERM, end)
notes.write(name + " in\\n")
time.sleep(60)
"""


def python(name: str, code: str, *args: object, **options: Any) -> ProcessSpec:
    return ProcessSpec(name, (sys.executable, "-S", "-c", code, *map(str, args)), **options)


def web(name: str, delay: float = 0, **options: Any) -> ProcessSpec:
    (port,) = free_ports(1)
    return python(name, WEB, port, delay, ready_url=f"http://127.0.0.1:{port}/", **options)


class Story:
    """What the supervisor told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def __call__(self, name: str, news: str) -> None:
        self.told.append((name, news))

    def times(self, name: str, news: str) -> int:
        return sum(who == name and what.startswith(news) for who, what in self.told)


async def until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110, it is another process that makes it hold
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    """Runs, and is no zombie (where the tests are a container's first processes nobody may collect orphans)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_process_starts_when_what_it_needs_is_ready(data_dir: Path) -> None:
    story = Story()
    specs = [web("second", after=("first",)), web("first", delay=0.5)]
    async with Supervisor(specs, data_dir, on_progress=story):
        pass
    assert [(name, news.split(" ")[0]) for name, news in story.told] == [
        ("first", "starting"),
        ("first", "ready"),
        ("second", "starting"),
        ("second", "ready"),
        ("second", "stopped"),
        ("first", "stopped"),
    ]


async def test_they_stop_in_the_reverse_order_each_with_time_to_end(data_dir: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    specs = [python("queue", NOTES, notes, "queue"), python("worker", NOTES, notes, "worker", after=("queue",))]
    async with Supervisor(specs, data_dir):
        await until(lambda: notes.exists() and notes.read_text().count("in") == 2)
    assert notes.read_text().split("\n")[2:] == ["worker out", "queue out", ""]


@pytest.mark.slow
async def test_a_process_that_crashes_is_started_again(data_dir: Path) -> None:
    story = Story()
    code = "print('about to fall', flush=True); raise SystemExit(3)"
    # The longest pause is also how long a process must have lived for its crash to be a first one: none lives so long here.
    async with Supervisor([python("faller", code)], data_dir, on_progress=story, backoff=(0.1, PATIENCE)):
        await until(lambda: story.times("faller", "ended with status 3\nabout to fall") >= 3)
    crashes = [news.split("\n") for _, news in story.told if news.startswith("ended")]
    assert [crash[1:] for crash in crashes[:3]] == [["about to fall", f"starting again in {pause} s"] for pause in (0.1, 0.2, 0.4)]


async def test_no_pause_is_longer_than_the_longest(data_dir: Path) -> None:
    story = Story()
    async with Supervisor([python("faller", "raise SystemExit(3)")], data_dir, on_progress=story, backoff=(500, 400)):
        await until(lambda: any("starting again in 400.0 s" in news for _, news in story.told))


READY_ONCE = """
import http.server, os, sys
port, marker = int(sys.argv[1]), sys.argv[2]
again = os.path.exists(marker)
open(marker, "w").close()
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if again else 200); self.end_headers()
        if not again and self.path == "/fall":
            os._exit(3)
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""


async def test_one_that_was_ready_is_left_alone_when_it_answers_that_it_is_not(data_dir: Path, tmp_path: Path) -> None:
    """As the decoder and the reviewer do during a training."""
    story, (port,) = Story(), free_ports(1)
    url = f"http://127.0.0.1:{port}"
    service = python("service", READY_ONCE, port, tmp_path / "marker", ready_url=url)
    supervisor = Supervisor([service], data_dir, on_progress=story, ready_timeout=PATIENCE, backoff=(0.05, 1))
    async with supervisor, httpx.AsyncClient() as client:
        await client.get(f"{url}/fall")
        await until(lambda: story.times("service", "answers") == 1)
        assert (await client.get(url)).status_code == 503
    assert story.times("service", "starting") == 2 and not story.times("service", "not ready")


async def test_one_that_never_gets_ready_ends_all_with_the_end_of_its_log(data_dir: Path, tmp_path: Path) -> None:
    broken = python("broken", "raise RuntimeError('no such model')", ready_url="http://127.0.0.1:9/", after=("fine",))
    notes = tmp_path / "notes"
    with pytest.raises(ProcessFailed, match=r"(?s)broken ended with status 1.*no such model.*broken\.log"):
        async with Supervisor([python("fine", NOTES, notes, "fine"), broken], data_dir, backoff=(0.05, PATIENCE)):
            pytest.fail("it was never ready")
    assert (data_dir / "logs" / "broken.log").read_text().count("RuntimeError") == 3


async def test_a_bug_in_watching_one_ends_all_instead_of_waiting_for_ever(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers(url: str | None, *, ready: bool) -> bool:
        raise ValueError(f"no such address: {url}")

    monkeypatch.setattr(supervisor, "_answers", answers)
    with pytest.raises(ProcessFailed, match=r"watched cannot run: no such address: nowhere"):
        async with Supervisor([python("watched", "input()", ready_url="nowhere")], data_dir):
            pytest.fail("it was never ready")


async def test_bad_settings_are_not_tried_twice(data_dir: Path) -> None:
    story = Story()
    code = "import sys; print('SIPO_X is not usable', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ProcessFailed, match="SIPO_X is not usable"):
        async with Supervisor([python("picky", code, ready_url="http://127.0.0.1:9/")], data_dir, on_progress=story):
            pytest.fail("it was never ready")
    assert story.times("picky", "starting") == 1


async def test_a_missing_program_is_told(data_dir: Path) -> None:
    with pytest.raises(ProcessFailed, match=r"ghost cannot run: .*no-such-program"):
        async with Supervisor([ProcessSpec("ghost", ("no-such-program",))], data_dir):
            pytest.fail("there is none")


async def test_one_that_does_not_end_is_killed_and_so_is_what_it_started(data_dir: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""
    story = Story()
    async with Supervisor([python("deaf", code, pids)], data_dir, on_progress=story, grace=0.3):
        await until(pids.exists)
        started = [int(pid) for pid in pids.read_text().split()]
        assert all(alive(pid) for pid in started)
    assert story.times("deaf", "killed after") == 1
    await until(lambda: not any(alive(pid) for pid in started))


OWNER = """
import sys
from pathlib import Path
from services.common.local.supervisor import ProcessSpec, Supervisor
sleeper = (sys.executable, "-S", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
specs = [ProcessSpec(name, sleeper) for name in "ab"]
Supervisor(specs, Path(sys.argv[1])).run()
"""


async def owner(data_dir: Path) -> tuple[asyncio.subprocess.Process, list[int]]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, str(data_dir))
    logs = [data_dir / "logs" / f"{name}.log" for name in "ab"]
    await until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
    return process, [int(log.read_text()) for log in logs]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_nothing_outlives_the_supervisor(data_dir: Path, number: signal.Signals) -> None:
    process, pids = await owner(data_dir)
    assert all(alive(pid) for pid in pids)
    process.send_signal(number)
    assert await process.wait() == (-number if number == signal.SIGKILL else 0)
    await until(lambda: not any(alive(pid) for pid in pids))


async def test_a_data_folder_has_one_supervisor(data_dir: Path) -> None:
    process, _ = await owner(data_dir)
    with pytest.raises(Conflict, match=rf"{data_dir} already \(process {process.pid}\)"):
        async with Supervisor([], data_dir):
            pytest.fail("there are two")
    process.terminate()
    await process.wait()
    async with Supervisor([], data_dir):
        assert (data_dir / "supervisor.lock").read_text() == str(os.getpid())


async def test_the_stack_brings_up_its_queue_and_tells_everyone_where_it_is(data_dir: Path) -> None:
    specs = {spec.name: spec for spec in stack_specs(CommonSettings(data_dir=data_dir), gateway_port=8123)}
    queue = specs.pop("queue")
    for name, spec in specs.items():
        assert spec.env["SIPO_REDIS_URL"] == queue.ready_url
        assert spec.ready_url == f"http://127.0.0.1:{spec.env[f'SIPO_{name.upper()}_PORT']}/ready"
        assert spec.env["SIPO_HOST"] == "127.0.0.1"
    assert specs["gateway"].ready_url == "http://127.0.0.1:8123/ready"
    assert specs["worker"].env["SIPO_DECODER_URL"] + "/ready" == specs["decoder"].ready_url
    assert [name for name, spec in specs.items() if spec.env.get("SIPO_TEACHERS") != ""] == ["worker", "gateway"], "keys"
    async with Supervisor([queue], data_dir):
        client = connect(str(queue.ready_url))
        assert await client.ping()
        await client.aclose()


@pytest.mark.parametrize(("sleeps", "after"), [(False, {"queue"}), (True, {"queue", "worker", "gateway"})])
def test_a_trainer_that_may_put_the_decoder_to_sleep_starts_when_nobody_waits_for_it(
    data_dir: Path, sleeps: bool, after: set[str]
) -> None:
    specs = {spec.name: spec for spec in stack_specs(CommonSettings(data_dir=data_dir, decoder_sleeps=sleeps))}
    assert set(specs["trainer"].after) == after
    assert specs["trainer"].env["SIPO_DECODER_SLEEPS"] == specs["decoder"].env["SIPO_DECODER_SLEEPS"] == str(sleeps)


def test_a_given_queue_is_used_instead_of_the_embedded_one(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIPO_REDIS_URL", "redis://elsewhere:6379")
    specs = stack_specs(CommonSettings(data_dir=data_dir))
    assert "queue" not in [spec.name for spec in specs]
    assert all(spec.env["SIPO_REDIS_URL"] == "redis://elsewhere:6379" and "queue" not in spec.after for spec in specs)
