"""`python -m sipo.training RUN.yaml`: one objective's run. Progress goes to stdout as lines of JSON, everything else to stderr."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import IO

from sipo.errors import Conflict, SipoError
from sipo.training.settings import Failure, Progress, read_run

CLAIM_SECONDS = 60
"""For which a run waits until another process has left it: one that is being ended, whose trainer was killed."""


def claim(path: Path) -> IO[str]:
    """The run's file, locked as long as it is open. Raises Conflict if another process keeps it."""
    file = path.open()
    for _ in range(CLAIM_SECONDS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(1)
    raise Conflict(f"{path.parent} is being trained already, by another process")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sipo.training")
    parser.add_argument("run", type=Path, metavar="RUN.yaml")
    parser.add_argument("--gpu-memory", type=float, default=1.0, help="part of its GPU's memory that this process may take")
    asked = parser.parse_args()
    # Libraries print to stdout as they like: the lines of JSON keep it, all else is sent to stderr.
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    os.dup2(2, 1)
    if "WORLD_SIZE" not in os.environ:
        # One process trains on one GPU: with more in sight transformers would use DataParallel, which TRL refuses.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    path: Path = asked.run

    def report(progress: Progress) -> None:
        if first:
            print(progress.model_dump_json(), file=stdout)

    try:
        run = read_run(path)
        lock = claim(path) if first else None  # noqa: F841  # kept until the process ends, however it does
        import torch

        from sipo.training.run import train

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(asked.gpu_memory, int(os.environ.get("LOCAL_RANK", "0")))
        train(run, path.parent, report)
    except SipoError as error:
        print(Failure(error=error.message).model_dump_json(), file=stdout)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
