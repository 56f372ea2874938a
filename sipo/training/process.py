"""What a process that trains or evaluates sees to before torch is imported: one GPU is enough, and its work is nobody else's."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from sipo.errors import Conflict

CLAIM_SECONDS = 60
"""For which a process waits until another has left its work: one that is being ended, whose trainer was killed."""


def take_one_gpu() -> None:
    """With more in sight transformers would use DataParallel, which TRL refuses. Several processes are each given their own."""
    if "WORLD_SIZE" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def claim(path: Path) -> IO[str]:
    """The file that says what the work is, locked until it is closed or the process ends. Raises Conflict if another process keeps
    it."""
    file = path.open()
    for _ in range(CLAIM_SECONDS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(1)
    file.close()
    raise Conflict(f"{path.parent} is another process's work already: wait for it, or stop it")
