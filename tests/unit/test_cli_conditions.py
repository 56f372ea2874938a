"""What may happen to any command on any machine ends it in one sentence, or none, and never in a traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from gateway.cli import app, version
from gateway.cli.client import Gateway
from gateway.cli.console import CommandLine, printable

pytestmark = pytest.mark.slow

MAIN = (sys.executable, "-c", "from gateway.entry import main; main()")


def outcome(error: BaseException) -> Result:
    """Of a command that raises it."""
    commands = typer.Typer(cls=CommandLine)

    @commands.callback()
    def options() -> None:
        """Makes a group of it."""

    @commands.command()
    def fails() -> None:
        raise error

    return CliRunner().invoke(commands, ["fails"])


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b.jsonl"),
            2,
            "cannot use a/b.jsonl: no such file or directory",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "cannot use /x: permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "cannot use /x: read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device", "/x", None, "/y"), 1, "cannot write /y: no space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write a file: no space left on device"),
        (ConnectionResetError(errno.ECONNRESET, "Reset"), 1, "a file or a connection cannot be used: reset"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_sentence(error: OSError, status: int, sentence: str) -> None:
    result = outcome(error)
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", f"error: {sentence}\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("what some library found")], ids=["bug", "no file"])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert outcome(error).exception is error


def test_an_interrupt_has_its_own_status_and_says_nothing() -> None:
    result = outcome(KeyboardInterrupt())
    assert (result.exit_code, result.output) == (130, "")


def test_an_interrupt_while_the_commands_are_imported_says_nothing() -> None:
    code = """
import sys, types
from gateway.entry import main
class Interrupted(types.ModuleType):
    def __getattr__(self, name):
        raise KeyboardInterrupt
sys.modules["gateway.cli"] = Interrupted("gateway.cli")
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_a_reader_that_has_enough_ends_a_command_without_a_word() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([*MAIN, "--version"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_output_that_cannot_be_written_is_told() -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run([*MAIN, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "error: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("command", ["--help", "jobs nonsense", "policies show nobody"])
def test_redirected_output_has_no_control_sequences(data_dir: Path, command: str) -> None:
    wishes = dict.fromkeys(("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"), "1")
    env = os.environ | wishes | {"SIPO_DATA_DIR": str(data_dir), "TERM": "xterm-256color"}
    ended = subprocess.run([*MAIN, *command.split()], capture_output=True, check=False, env=env)
    said = (ended.stdout + ended.stderr).decode()
    assert len(said) > 30 and printable(said) == said


def test_what_a_model_wrote_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\n\tc\x9b2Jd\x7f é 🙂") == "a[31mb\n\tc2Jd é 🙂"


def test_the_version_tells_those_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = CliRunner().invoke(app, ["--version"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["sipo", "python", "vllm", "torch", "transformers", "trl", "peft"]
    assert "not installed" not in "".join(lines)
    monkeypatch.setattr(version, "BESIDE", {"vllm": ("no-such-package",)})
    assert CliRunner().invoke(app, ["--version"]).stdout.splitlines()[2:] == ["vllm is not installed"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a web server that is no gateway."""
    page = httpx.MockTransport(lambda _request: httpx.Response(200, text="<html>Welcome</html>"))
    begin = Gateway.__init__

    def answered_by_the_page(self: Gateway, url: str) -> None:
        begin(self, url)
        self._http = httpx.Client(base_url=url, transport=page)

    monkeypatch.setattr(Gateway, "__init__", answered_by_the_page)
    yield "http://elsewhere:8000"


def test_a_web_server_that_is_no_gateway_is_told(elsewhere: str) -> None:
    result = CliRunner().invoke(app, ["jobs", "list", "--url", elsewhere])
    assert (result.exit_code, result.stderr) == (1, f"error: what answers at {elsewhere} is no SIPO gateway: give --url\n")


@pytest.mark.slow
def test_ctrl_c_while_all_is_starting_ends_all_and_says_so_by_the_status(data_dir: Path, tmp_path: Path) -> None:
    env = os.environ | {"SIPO_DATA_DIR": str(data_dir)}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen([*MAIN, "up", "--port", "1"], stdout=said, stderr=said, env=env)
        while b"starting" not in (tmp_path / "said").read_bytes():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    lines = (tmp_path / "said").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"starting", "stopped"}
