"""What the gateway reads of a job's decisions.jsonl, which the trainer may be writing: only lines that are complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.common.contract.messages import PromptDecided


def whole_lines(path: Path) -> Iterator[bytes]:
    """None at all where there is no such file yet."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def read_decisions(path: Path) -> Iterator[PromptDecided]:
    """A prompt that had failed and was decided later comes twice, the failure first."""
    return map(PromptDecided.model_validate_json, whole_lines(path))
