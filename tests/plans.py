"""The plan of a job's candidates, for tests that do not care what most of it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.common.contract.messages import SamplingPlan
from sipo.preferences import uniform_weights


def sampling_plan(objectives: Sequence[str] = ("a", "b"), **fields: Any) -> SamplingPlan:
    """One weight, w_e the same, refined; `fields` are those that a test has another wish for."""
    halves = uniform_weights(objectives)
    usual: dict[str, Any] = {
        "sampling_set": "demo:1",
        "reward_set": "demo:1",
        "weights": [halves],
        "review_weights": halves,
        "refine": True,
        "samples_per_weight": 1,
        "temperature": 0.7,
        "seed": 0,
        "max_tokens": 32,
        "review_max_tokens": 16,
    }
    return SamplingPlan(**usual | fields)
