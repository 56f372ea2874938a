"""`python -m sipo.training RUN.yaml`: one objective's run. Progress goes to stdout as lines of JSON, everything else to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sipo.errors import SipoError
from sipo.training.settings import Failure, Progress, read_run


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m sipo.training RUN.yaml", file=sys.stderr)
        return 2
    # Libraries print to stdout as they like: the lines of JSON keep it, all else is sent to stderr.
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    os.dup2(2, 1)
    path = Path(sys.argv[1])

    def report(progress: Progress) -> None:
        if first:
            print(progress.model_dump_json(), file=stdout)

    try:
        run = read_run(path)
        from sipo.training.run import train

        train(run, path.parent, report)
    except SipoError as error:
        if first:
            print(Failure(error=error.message).model_dump_json(), file=stdout)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
