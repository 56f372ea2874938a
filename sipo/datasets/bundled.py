"""The data that ships with the project: see sipo/data/bundled/README.md, and the scripts that make it, scripts/make_*_data.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Literal

from sipo.errors import InvalidRequest
from sipo.evaluation.ground_truth import REWARDS
from sipo.preferences import Example

Split = Literal["train", "validation", "test"]

BUNDLED_OBJECTIVES = ("concise", "warm")
"""Those that every stored pair is labelled for, and differs in clearly."""

CLEAR = 0.03
"""How much the rewards of two responses must differ for a label."""

_FOLDER = files("sipo") / "data" / "bundled"


def bundled_examples(split: Split | None = None, objectives: Sequence[str] = BUNDLED_OBJECTIVES) -> list[Example]:
    """The pairs labelled for these objectives: all of them, or one split (80/10/10 by prompt).

    `concise` and `warm` are labelled in the file. Every other objective of REWARDS is labelled here, where the rewards of the two
    responses differ by CLEAR; a pair without any label is left out. Raises InvalidRequest for an objective that has no function.
    """
    return _examples("train.jsonl", split, objectives)


def bundled_on_policy_examples(split: Split | None = None, objectives: Sequence[str] = BUNDLED_OBJECTIVES) -> list[Example]:
    """Pairs of answers that the fine-tuned model sampled, up to three of a prompt, labelled and split as those of bundled_examples.

    Raises as bundled_examples does.
    """
    return _examples("on_policy.jsonl", split, objectives)


def _examples(file: str, split: Split | None, objectives: Sequence[str]) -> list[Example]:
    if unknown := [name for name in objectives if name not in REWARDS]:
        raise InvalidRequest(
            f"the bundled data has no objective {unknown[0]!r}: there are {', '.join(REWARDS)}", param="objectives"
        )
    rows = [row for row in _rows(file) if split in (None, row["split"])]
    labelled = [(row, _labels(row, objectives)) for row in rows]
    return [Example.model_validate(row | {"labels": labels}) for row, labels in labelled if labels]


def _labels(row: dict[str, Any], objectives: Sequence[str]) -> dict[str, int]:
    labels = {}
    for name in objectives:
        if name in row["labels"]:
            labels[name] = row["labels"][name]
            continue
        first, second = (REWARDS[name](row["prompt"], row[key]) for key in ("response_0", "response_1"))
        if abs(second - first) >= CLEAR:
            labels[name] = int(second > first)
    return labels


def bundled_eval_prompts() -> list[str]:
    """300 prompts that share none with the labelled pairs: for finding settings, and for looking at fronts again and again."""
    return [row["prompt"] for row in _rows("eval_prompts.jsonl")]


def bundled_test_prompts() -> list[str]:
    """547 further prompts, for the one look at a front after all settings are fixed."""
    return [row["prompt"] for row in _rows("test_prompts.jsonl")]


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines()]
