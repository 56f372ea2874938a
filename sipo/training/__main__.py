"""`python -m sipo.training RUN.yaml`: one objective's run, or a fine-tuning. Progress goes to stdout as lines of JSON, all else to
stderr."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from sipo.errors import SipoError
from sipo.training.process import claim, take_one_gpu
from sipo.training.run_folder import SftFolder, read_any_run
from sipo.training.settings import Failure, Progress, SftRun


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sipo.training")
    parser.add_argument("run", type=Path, metavar="RUN.yaml")
    parser.add_argument("--gpu-memory", type=float, default=1.0, help="part of its GPU's memory that this process may take")
    asked = parser.parse_args()
    # Libraries print to stdout as they like: the lines of JSON keep it, all else is sent to stderr.
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    os.dup2(2, 1)
    take_one_gpu()
    path: Path = asked.run

    def report(progress: Progress) -> None:
        if first:
            print(progress.model_dump_json(), file=stdout)

    try:
        run = read_any_run(path)
        with claim(path) if first else nullcontext():
            import torch

            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(asked.gpu_memory, int(os.environ.get("LOCAL_RANK", "0")))
            if isinstance(run, SftRun):
                from sipo.training.sft import train_sft

                if (folder := SftFolder(path.parent)).finished() is None:
                    train_sft(run, folder.answers(), folder.adapter.absolute(), report)
            else:
                from sipo.training.run import train

                train(run, path.parent, report)
    except SipoError as error:
        print(Failure(error=error.message).model_dump_json(), file=stdout)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
