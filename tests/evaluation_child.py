"""`python -m sipo.evaluation` with an engine that answers by rote: `python -m tests.evaluation_child LOG STOP … FOLDER`.

LOG gets a line for each batch. Before the batch with the number STOP (0: none) it waits to be ended, unless LOG says that another
process has done so.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import sipo.decoding
from sipo.evaluation.__main__ import main
from tests.evaluation import FakeEngine

log, stop = Path(sys.argv.pop(1)), int(sys.argv.pop(1))


class StoppingEngine(FakeEngine):
    def generate(self, prompts: Any, weights: Any = None, **how: Any) -> Any:
        if stop and len(self.batches) + 1 == stop and "waits" not in log.read_text():
            _say(f"waits {os.getpid()}")
            time.sleep(600)
        _say(f"batch {len(prompts)}")
        return super().generate(prompts, weights, **how)


def _say(line: str) -> None:
    with log.open("a") as file:
        file.write(f"{line}\n")


engine = StoppingEngine()
sipo.decoding.OfflineDecoder = engine.open  # type: ignore[assignment,misc]
sys.exit(main())
