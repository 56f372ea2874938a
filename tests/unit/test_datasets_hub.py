"""Data sets by name, from a hub on this machine. Its address is read when the libraries are imported, hence the processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SHA = "0" * 40
PAIR = b'{"prompt": "p", "chosen": "a", "rejected": "b"}'


def card(configurations: str) -> bytes:
    return f"---\nconfigs:\n{configurations}---\n".encode()


REPOSITORIES = {
    "me/one": {
        "README.md": card(
            "- {config_name: default, data_files: [{split: first, path: a.jsonl}, {split: second, path: a.jsonl}]}\n"
        ),
        "a.jsonl": PAIR,
    },
    "me/two": {
        "README.md": card("- {config_name: b, data_files: a.jsonl}\n- {config_name: c, data_files: a.jsonl}\n"),
        "a.jsonl": PAIR,
    },
}
READ = """
import sys
from sipo.datasets import read
from sipo.errors import SipoError
for source in sys.argv[1:]:
    try:
        print(read(source).rows[0].chosen)
    except SipoError as error:
        print(type(error).__name__, error)
"""


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub as `datasets` asks for."""

    def do_GET(self) -> None:
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["datasets", owner, name, "resolve", _, *path]:
                content = REPOSITORIES[f"{owner}/{name}"].get("/".join(path))
                if content is None:
                    self._answer(404, b"", "EntryNotFound")
                else:
                    self._answer(200, content)
            case ["api", "datasets", "me", "gated"]:
                self._answer(401, b"{}", "GatedRepo")
            case ["api", "datasets", "me", "busy"]:
                self._answer(503, b"{}")
            case ["api", "datasets", owner, name, *rest] if f"{owner}/{name}" in REPOSITORIES:
                files = REPOSITORIES[f"{owner}/{name}"]
                tree = [{"type": "file", "path": file, "size": len(content), "oid": SHA} for file, content in files.items()]
                about = {"id": f"{owner}/{name}", "sha": SHA, "siblings": [{"rfilename": file} for file in files]}
                self._answer(200, json.dumps(tree if rest[:1] == ["tree"] else about).encode())
            case _:
                self._answer(404, b"{}", "RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, content: bytes, error: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), "ETag": f'"{hash(content):x}"', "X-Repo-Commit": SHA, "X-Error-Code": error}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries' caches."""
    return tmp_path_factory.mktemp("home")


def read_all(folder: Path, *sources: str, **environment: str) -> list[str]:
    """The chosen response or the error of each source. Whatever else is said, on either stream, fails the test."""
    unset = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", READ, *sources],
        env={**inherited, "PYTHONPATH": path, "NO_PROXY": "127.0.0.1", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(sources)
    return lines


def test_a_data_set_is_read_or_refused_by_what_the_hub_says_of_it(hub: str, home: Path, tmp_path: Path) -> None:
    sources = ("me/one:first", "me/one:first[:1]", "me/one", "me/one:nope", "me/two", "me/gated", "me/none", "me/busy")
    first, cut, no_train, no_split, several, gated, none, busy = read_all(tmp_path, *sources, HF_ENDPOINT=hub, HF_HOME=str(home))
    assert first == cut == "a"
    assert no_train == "NotFound the data set me/one has no split 'train': give one of me/one:first, me/one:second"
    assert no_split == "NotFound the data set me/one has no split 'nope': give one of me/one:first, me/one:second"
    assert "me/two has several configurations (b, c)" in several
    assert gated.startswith("InvalidRequest the data set me/gated is gated: accept its terms")
    assert none.startswith(f"NotFound there is no file me/none, and no data set of that name at {hub}")
    assert busy == f"Unavailable there is no file me/busy, and the hub ({hub}) answers with status 503"


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_the_hub_only_what_was_read_before_is_read(
    environment: dict[str, str], hub: str, home: Path, tmp_path: Path
) -> None:
    read_all(tmp_path, "me/one:first", HF_ENDPOINT=hub, HF_HOME=str(home))
    before, new, bare = read_all(tmp_path, "me/one:first", "me/two", "json", **environment, HF_HOME=str(home))
    reason = "HF_HUB_OFFLINE keeps" if "HF_HUB_OFFLINE" in environment else "the hub (http://127.0.0.1:9) cannot be asked"
    assert before == "a"
    assert new.startswith(f"Unavailable there is no file me/two, and {reason}")
    assert bare.startswith(f"Unavailable there is no file json, and {reason}")


def test_a_folder_here_is_never_taken_for_a_data_set(home: Path, tmp_path: Path) -> None:
    (tmp_path / "me" / "one").mkdir(parents=True)
    (answer,) = read_all(tmp_path, "me/one:first", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(home))
    assert answer.startswith("InvalidRequest me/one is a file or folder here")
