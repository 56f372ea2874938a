"""How far a judge agrees with the exact function of its objective, where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sipo.conversation import as_text
from sipo.evaluation.answers import Answer
from sipo.evaluation.bootstrap import draws
from sipo.evaluation.ground_truth import REWARDS
from sipo.evaluation.indicators import agreement
from sipo.evaluation.judging import Rewards
from sipo.evaluation.measured import Measure
from sipo.evaluation.plan import EXACT, Plan
from sipo.evaluation.report import Interval


def agreements(
    plan: Plan, answers: Mapping[str, Sequence[Answer]], rewards: Mapping[str, Rewards], *, seed: int
) -> dict[str, Interval]:
    """By objective that has an exact function (sipo.evaluation.ground_truth) and another judge: of the pairs of different answers
    to one prompt, of all methods and weights, the share that both order alike, on average over the prompts."""
    found = {}
    for objective, address in plan.judges.items():
        if objective in REWARDS and address != f"{EXACT}{objective}":
            of_prompts = (_of_prompt(plan, objective, answers, rewards, index) for index in range(len(plan.prompts)))
            shares = [share for share in of_prompts if share is not None]
            if len(shares) > 1:
                found[objective] = Measure(np.empty(0), draws(len(shares), seed=seed), ()).mean(np.array(shares))
    return found


def _of_prompt(
    plan: Plan, objective: str, answers: Mapping[str, Sequence[Answer]], rewards: Mapping[str, Rewards], index: int
) -> float | None:
    """None where all answers are the same."""
    judged: dict[str, float] = {}
    for method in plan.methods:
        points = len(method.points)
        texts = (answer.text for answer in answers[method.name][index * points : (index + 1) * points])
        judged |= zip(texts, rewards[objective][method.name][index], strict=True)
    if len(judged) < 2:
        return None
    prompt = as_text(plan.prompts[index].prompt)
    exact = [REWARDS[objective](prompt, text) for text in judged]
    return agreement([list(judged.values())], [exact])
