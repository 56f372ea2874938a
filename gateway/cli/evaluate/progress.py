"""How far an evaluation is, stage by stage: live on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gateway.cli.console import complaints
from gateway.cli.progress import LINE_SECONDS
from sipo.words import share


class Display:
    """`tell` is what sipo.evaluation calls. On stderr, as stdout has the report."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=complaints,
            speed_estimate_period=600,  # of a few chunks, each of which may take minutes
            disable=not complaints.is_terminal,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._began = time.monotonic()
        self._said = 0.0
        self._stage = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def tell(self, stage: str, done: int, of: int) -> None:
        begins = stage != self._stage
        if begins:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=of, completed=done)
        else:
            self._bars.update(self._task, completed=done)
        now = time.monotonic()
        if not complaints.is_terminal and (begins or done == of or now - self._said >= LINE_SECONDS):
            left = self._bars.tasks[self._task].time_remaining
            words = "" if begins or left is None or done == of else f", {left:.0f} s left"
            complaints.print(f"{now - self._began:6.0f} s  {stage}: {share(done, of, 'prompt')}{words}", markup=False)
            self._said = now
