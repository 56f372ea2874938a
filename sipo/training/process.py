"""What a training process sees to before torch is imported: one GPU is enough for it, and its run is nobody else's."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from sipo.errors import Conflict

CLAIM_SECONDS = 60
"""For which a run waits until another process has left it: one that is being ended, whose trainer was killed."""


def take_one_gpu() -> None:
    """With more in sight transformers would use DataParallel, which TRL refuses. Several processes are each given their own."""
    if "WORLD_SIZE" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def claim(path: Path) -> IO[str]:
    """The run's file, locked until it is closed or the process ends. Raises Conflict if another process keeps it."""
    file = path.open()
    for _ in range(CLAIM_SECONDS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(1)
    file.close()
    raise Conflict(f"{path.parent} is being trained already, by another process")
