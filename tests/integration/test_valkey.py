from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from services.common.local.processes import free_ports
from services.common.local.valkey import server, stop_leftover


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with server(tmp_path) as url:
        client = redis.Redis.from_url(url, decode_responses=True)
        client.xadd("stream", {"data": "kept"})
        config = client.config_get("append*")
        assert (config["appendonly"], config["appendfsync"]) == ("yes", "always")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    with server(tmp_path) as url:
        assert redis.Redis.from_url(url, decode_responses=True).xrange("stream")[0][1] == {"data": "kept"}  # type: ignore[index]


@pytest.mark.parametrize("name", ["a \"b' c é", "back\\slash", "line\nbreak", "$x #y", "\udcff"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    with server(folder) as left:
        redis.Redis.from_url(left).set("key", "value")
        assert (folder / "appendonlydir").is_dir()
        with server(folder) as url:
            assert redis.Redis.from_url(url).get("key") == b"value"
            with pytest.raises(redis.ConnectionError):
                redis.Redis.from_url(left).ping()


def test_a_server_left_in_the_folder_is_stopped_before_another_starts(tmp_path: Path) -> None:
    with server(tmp_path) as left:
        redis.Redis.from_url(left).set("key", "value")
        with server(tmp_path) as url:
            assert url != left
            assert redis.Redis.from_url(url).get("key") == b"value"
            with pytest.raises(redis.ConnectionError):
                redis.Redis.from_url(left).ping()


def test_a_server_of_another_folder_is_left_alone(tmp_path: Path) -> None:
    with server(tmp_path / "a") as url:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "valkey.conf").write_text((tmp_path / "a" / "valkey.conf").read_text())
        stop_leftover(tmp_path / "b")
        assert redis.Redis.from_url(url).ping()


OWNER = """
import sys
from pathlib import Path
from services.common.local.valkey import server
with server(Path(sys.argv[1])) as url:
    print(url, flush=True)
    input()
"""


def test_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        url = owner.stdout.readline().strip()
        assert redis.Redis.from_url(url).ping()
        owner.kill()
    until = time.monotonic() + 10
    with pytest.raises(redis.ConnectionError):
        while time.monotonic() < until:
            redis.Redis.from_url(url).ping()
            time.sleep(0.05)


def test_free_ports_are_different(tmp_path: Path) -> None:
    assert len(set(free_ports(50))) == 50
