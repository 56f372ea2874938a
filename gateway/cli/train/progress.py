"""How far the runs of `sipo train` are: a bar per policy on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn

from gateway.cli.console import console
from gateway.cli.progress import LINE_SECONDS
from sipo.training.settings import Progress as Training


class Display:
    """Runs are shown one after the other: `begin`, then `tell` for what each says."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[words]}", markup=False),
            console=console,
            disable=not console.is_interactive,
        )
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def begin(self, name: str, data: str) -> None:
        """`data`: how much there is to train on, such as "12 pairs"."""
        self._name = name
        self._stage = ""
        self._task = self._bars.add_task(name, total=None, words=f"loads the model, {data}")
        self._line(f"loads the model, {data}")

    async def tell(self, progress: Training) -> None:
        if progress.note is not None:
            console.print(f"{self._name}: {progress.note}", markup=False)
            return
        self._bars.update(self._task, total=progress.of, completed=progress.step, words=words(progress))
        if progress.stage != self._stage or time.monotonic() - self._said >= LINE_SECONDS:
            self._stage = progress.stage
            self._line(words(progress))

    def end(self, how: str) -> None:
        self._bars.update(self._task, total=1, completed=1, words=how)
        self._line(how)

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        if not console.is_interactive:
            console.print(f"{self._said - self._began:6.0f} s  {self._name}: {text}", markup=False)


def words(progress: Training) -> str:
    left = f"{progress.seconds_left:.0f} s left"
    if progress.stage == "reference":
        return f"reference {progress.step}/{progress.of} pairs, {left}"
    rewards = "" if progress.margin is None else f", margin {progress.margin:.3f}, accuracy {progress.accuracy:.2f}"
    return f"training {progress.step}/{progress.of}, loss {progress.loss:.4f}{rewards}, {left}"
