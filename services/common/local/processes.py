"""Child processes that do not outlive us, and ports for them."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def dies_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the child gets SIGTERM when this process ends, however it ends (Linux; elsewhere it does nothing).

    The kernel means the thread that started the child: start it from the main thread, or one that lives as long as the process.
    """
    parent = os.getpid()

    def before_exec() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it ended between fork and here
                os._exit(1)

    return before_exec


_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that were free a moment ago, none of which this process was given before: who got one may not listen on it
    yet. Below those that outgoing connections are given."""
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 12000):
        if len(found) == count:
            break
        if port not in _given:
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                found.append(port)
    _given.update(found)
    return found
