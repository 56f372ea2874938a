"""The data set that ships with the project: see sipo/data/bundled/README.md, and scripts/make_bundled_data.py that makes it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal

from sipo.preferences import Example

Split = Literal["train", "validation", "test"]

_FOLDER = files("sipo") / "data" / "bundled"


def bundled_examples(split: Split | None = None) -> list[Example]:
    """The labelled pairs for `concise` and `warm`: all of them, or one split (80/10/10 by prompt)."""
    return [Example.model_validate(row) for row in _rows("train.jsonl") if split in (None, row["split"])]


def bundled_eval_prompts() -> list[str]:
    """300 prompts that share none with the labelled pairs."""
    return [row["prompt"] for row in _rows("eval_prompts.jsonl")]


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines()]
