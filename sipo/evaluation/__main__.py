"""`python -m sipo.evaluation FOLDER`: the evaluation that is asked for there (sipo.evaluation.task). Progress goes to stdout as
lines of JSON, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from sipo.errors import SipoError
from sipo.evaluation.task import TaskFolder, run
from sipo.record import Record
from sipo.training.process import claim, take_one_gpu
from sipo.training.settings import Failure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sipo.evaluation")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--gpu-memory", type=float, default=1.0, help="part of its GPU's memory that this process may take")
    asked = parser.parse_args()
    # Libraries print to stdout as they like: the lines of JSON keep it, all else is sent to stderr.
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    take_one_gpu()
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    folder = TaskFolder(asked.folder)

    def tell(line: Record) -> None:
        print(line.model_dump_json(), file=stdout)

    try:
        with claim(folder.task_file):  # a process that is being ended may work here yet
            run(folder, tell, asked.gpu_memory)
    except SipoError as error:
        tell(Failure(error=error.message))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
