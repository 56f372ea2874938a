"""The decisions of each job on disk, in its decisions.jsonl: appended, synced, and only then acknowledged to the queue.

One writer at a time (the trainer holds a lease), any number of readers. A prompt has one line; a prompt that failed and was decided
later has two, and the last one counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from services.common.contract.job_files import JobFiles
from services.common.contract.messages import PromptDecided
from sipo.errors import Conflict, NotFound
from sipo.files import sync

Outcome = Literal["accepted", "none", "failed"]


class DecisionLog:
    """`outcomes`: what is on disk, by round and prompt."""

    def __init__(self, folder: Path) -> None:
        """Opens the log of the job in `folder`; a last line that a crash left unfinished is cut off: it was never acknowledged."""
        if not folder.is_dir():
            raise NotFound(f"there is no job folder {folder}: its decisions have no place")
        self.path = JobFiles(folder).decisions
        self.outcomes: dict[tuple[int, str], Outcome] = {}
        if self.path.exists():
            _cut_torn_line(self.path)
            self.outcomes = {(decision.round, decision.prompt): decision.outcome for decision in self.read()}

    def append(self, decisions: Sequence[PromptDecided]) -> None:
        """On disk when this returns. A decision that is there already is skipped: deliveries may come twice.

        After an OSError the end of the file is unknown: open the log again.
        """
        outcomes = dict(self.outcomes)
        lines = []
        for decision in decisions:
            before = outcomes.get((decision.round, decision.prompt))
            if before is None or (before == "failed" and decision.outcome != "failed"):
                outcomes[decision.round, decision.prompt] = decision.outcome
                lines.append(decision.model_dump_json().encode() + b"\n")
        if not lines:
            return
        created = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        if created:
            sync(self.path.parent)
        self.outcomes = outcomes

    def read(self, round_: int | None = None) -> list[PromptDecided]:
        """The decisions that count, in the order of their prompts' first ones; of one round or of all."""
        found: dict[str, PromptDecided] = {}
        if self.path.exists():
            with self.path.open() as file:
                for number, line in enumerate(file, start=1):
                    try:
                        decision = PromptDecided.model_validate_json(line)
                    except ValueError as error:
                        raise Conflict(f"{self.path}, line {number} is damaged: {error}") from error
                    if round_ in (None, decision.round):
                        found[decision.id] = decision
        return list(found.values())

    def decided(self, round_: int) -> int:
        return sum(one == round_ for one, _ in self.outcomes)

    def counts(self, round_: int) -> dict[str, int]:
        """The job's counts as far as decisions make them."""
        outcomes = [outcome for (one, _), outcome in self.outcomes.items() if one == round_]
        return {"decided": len(outcomes)} | {name: outcomes.count(name) for name in ("accepted", "none", "failed")}


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())
