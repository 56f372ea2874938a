"""Objectives, preference weights and labelled examples (paper section 2).

Preference weights w are named, not positional: {"helpful": 0.7, "harmless": 0.3}, w_i >= 0, sum 1.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sipo.conversation import Prompt
from sipo.errors import InvalidRequest, InvalidWeights

Weights = dict[str, float]
"""Preference weights by objective: every objective of the set is present, each >= 0, together 1."""

SUM_TOLERANCE = 1e-3
MAX_SAMPLING_WEIGHTS = 8

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")

MOD, SOUP, BASE, REFERENCE = MODES = ("mod", "soup", "base", "reference")
"""The words that a request's `mode` has besides the objectives: no objective may be called so. BASE is also the name under which
the model without any adapter is asked for: no policies may be called so. REFERENCE is what a set's policies were aligned from."""

SamplingMode = Literal["mod", "soup"]
"""How policies are joined at a weight: their logits mixed, or their parameters averaged."""

ObjectiveName = Annotated[str, StringConstraints(pattern=rf"^{_NAME.pattern}$")]


class Example(BaseModel):
    """One labelled pair: (x, y_-1, y_1, p_1 … p_N).

    `response_0` is y_-1 and `response_1` is y_1; a label of 1 means p_i = +1, the objective prefers `response_1`. An objective
    without a label does not speak about this pair (D_i are the examples that carry objective i).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: Prompt
    response_0: str
    response_1: str
    labels: dict[ObjectiveName, Literal[0, 1]] = Field(min_length=1)

    def conflicting(self, objectives: Sequence[str] | None = None) -> bool:
        """True if two of the (given) objectives that are labelled here prefer different responses."""
        labels = {label for name, label in self.labels.items() if objectives is None or name in objectives}
        return len(labels) > 1

    def chosen_rejected(self, objective: str) -> tuple[str, str]:
        """(preferred, dispreferred) response for one labelled objective."""
        pair = (self.response_0, self.response_1)
        label = self.labels[objective]
        return pair[label], pair[1 - label]


def check_objectives(objectives: Sequence[str], *, param: str = "objectives") -> None:
    """Raises InvalidRequest for a name that no objective can have."""
    for name in objectives:
        if name in MODES or not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name!r} cannot be an objective's name: a letter, then up to 63 letters, digits, - and _; "
                f"and not one of the modes {', '.join(MODES)}",
                param=param,
            )


def is_finite_number(value: Any) -> bool:
    """Of any value that JSON can hold; an integer too large for a float is not finite here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def normalize_weights(weights: Mapping[str, float], objectives: Sequence[str], *, param: str = "preference_weights") -> Weights:
    """The weights in the objectives' order, scaled to sum exactly 1.

    Raises InvalidWeights for a missing or unknown objective, a value that is no finite number >= 0, or a sum further than
    SUM_TOLERANCE from 1.
    """
    names = ", ".join(objectives)
    if unknown := [name for name in weights if name not in objectives]:
        raise InvalidWeights(f"unknown objective {unknown[0]!r}: this policy set has {names}", param=param)
    if missing := [name for name in objectives if name not in weights]:
        raise InvalidWeights(f"no weight for {missing[0]!r}: give one for each of {names} (0 is allowed)", param=param)
    for name, value in weights.items():
        if not is_finite_number(value) or value < 0:
            raise InvalidWeights(f"the weight of {name!r} is {value!r}: it must be a finite number, 0 or more", param=param)
    total = sum(weights.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise InvalidWeights(f"the weights sum to {total:g}: they must sum to 1 (within {SUM_TOLERANCE:g})", param=param)
    return {name: weights[name] / total for name in objectives}


def parse_weights(text: str, *, param: str = "preference_weights") -> Weights:
    """Reads "helpful=0.7,harmless=0.3". Only the form is checked; normalize_weights checks the values."""
    weights: Weights = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or not _NAME.fullmatch(name) or math.isnan(number):
            raise InvalidWeights(f"cannot read {part.strip()!r}: write weights as helpful=0.7,harmless=0.3", param=param)
        if name in weights:
            raise InvalidWeights(f"{name!r} has two weights", param=param)
        weights[name] = number
    return weights


def format_weights(weights: Mapping[str, float]) -> str:
    """The inverse of parse_weights, at six digits; also the name of a soup's reward."""
    return ",".join(f"{name}={value:.6g}" for name, value in weights.items())


def uniform_weights(objectives: Sequence[str]) -> Weights:
    return {name: 1 / len(objectives) for name in objectives}


def one_hot_weights(objective: str, objectives: Sequence[str]) -> Weights:
    return {name: float(name == objective) for name in objectives}


def sampling_weights(objectives: Sequence[str]) -> list[Weights]:
    """The default W without its vertices.

    Two objectives: 0.2, 0.4, 0.6, 0.8, as in the paper. More: the uniform weights and the midpoints of pairs of objectives, at most
    MAX_SAMPLING_WEIGHTS. (The vertices of W are the policies themselves.)
    """
    if len(objectives) == 2:
        first, second = objectives
        return [{first: step / 5, second: (5 - step) / 5} for step in (1, 2, 3, 4)]
    midpoints = [{name: 0.5 * (name in pair) for name in objectives} for pair in combinations(objectives, 2)]
    return [uniform_weights(objectives), *midpoints][:MAX_SAMPLING_WEIGHTS]
