"""What an evaluation is made of, settled before anything is generated: prompts, methods, weights and judges."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import httpx

from sipo.errors import InvalidRequest
from sipo.evaluation.methods import Method
from sipo.evaluation.prompts import TestPrompt
from sipo.preferences import Weights, check_objectives, normalize_weights, one_hot_weights, parse_weights, sampling_weights

POINTS = 6
"""Weights on the front of two objectives, as in the paper: 0, 0.2 … 1."""
EXAMPLE = "concise=python:concise"
EXACT = "python:"
"""How the address of a judge begins whose rewards count as they are: a function, of which 0 means something."""


@dataclass(frozen=True)
class Plan:
    """`judges`: the address of each objective's reward model."""

    name: str
    prompts: Sequence[TestPrompt]
    methods: Sequence[Method]
    judges: Mapping[str, str]
    max_tokens: int

    def __post_init__(self) -> None:
        """Raises InvalidRequest for methods and judges that do not fit together."""
        if len(self.prompts) < 2:
            raise InvalidRequest(f"intervals need 2 prompts or more: there are {len(self.prompts)}", param="prompts")
        if not self.methods:
            raise InvalidRequest("there is nothing to evaluate: name a method, as --method base", param="method")
        names = [method.name for method in self.methods]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequest(f"two methods are called {twice!r}: each needs a name of its own", param="method")
        inexact = [objective for objective, address in self.judges.items() if not address.startswith(EXACT)]
        if inexact and self.base_method is None:
            raise InvalidRequest(
                f"the rewards of {inexact[0]} are counted from the base's, as their own zero means nothing: add --method base",
                param="method",
            )

    @property
    def objectives(self) -> list[str]:
        return list(self.judges)

    @property
    def base_method(self) -> Method | None:
        """The first of them: other rewards are told in its terms."""
        return next((method for method in self.methods if method.kind == "base"), None)

    @property
    def has_originals(self) -> bool:
        """Whether there are two responses to every prompt that answers can be compared with."""
        return all(prompt.originals is not None for prompt in self.prompts)

    @cached_property
    def prompts_sha256(self) -> str:
        return hashlib.sha256("\n".join(prompt.model_dump_json() for prompt in self.prompts).encode()).hexdigest()

    def identity(self) -> dict[str, object]:
        """All that answers and scores depend on: equal for evaluations that may share a folder."""
        return {
            "prompts": self.prompts_sha256,
            "methods": [method.identity() for method in self.methods],
            "judges": {objective: shown(address) for objective, address in self.judges.items()},
            "max_tokens": self.max_tokens,
        }

    def identity_text(self) -> str:
        return json.dumps(self.identity(), indent=1, ensure_ascii=False) + "\n"


def read_judges(texts: Sequence[str]) -> dict[str, str]:
    """Addresses by objective, of OBJECTIVE=ADDRESS each. Raises InvalidRequest."""
    judges: dict[str, str] = {}
    for text in texts:
        objective, equals, address = text.partition("=")
        if not equals or not address:
            raise InvalidRequest(f"cannot read the judge {text!r}: write OBJECTIVE=ADDRESS, as {EXAMPLE}", param="judge")
        check_objectives([objective], param="judge")
        if objective in judges:
            raise InvalidRequest(f"{objective!r} has two judges: give one for each objective", param="judge")
        judges[objective] = address
    if len(judges) < 2:
        raise InvalidRequest(f"a front has two objectives or more: give a judge for each, as --judge {EXAMPLE}", param="judge")
    return judges


def points_of(objectives: Sequence[str], texts: Sequence[str]) -> list[Weights]:
    """The weights at which every method answers: an even grid of so many for two objectives ("6"), or those given. By default a
    grid of POINTS; for more objectives the vertices, the uniform weights and the midpoints. Raises InvalidRequest."""
    if len(texts) <= 1 and (not texts or re.fullmatch(r"[0-9]{1,6}", texts[0])):
        if len(objectives) == 2:
            return _grid(objectives, int(texts[0]) if texts else POINTS)
        if texts:
            raise InvalidRequest(
                "an even grid is for two objectives: repeat --weights for each of more, or leave it out for the vertices, the "
                "uniform weights and the midpoints",
                param="weights",
            )
        return [*(one_hot_weights(name, objectives) for name in objectives), *sampling_weights(objectives)]
    points = [normalize_weights(parse_weights(text, param="weights"), objectives, param="weights") for text in texts]
    for index, point in enumerate(points):
        if any(all(math.isclose(point[name], other[name], abs_tol=1e-6) for name in point) for other in points[:index]):
            raise InvalidRequest(f"the weights {texts[index]} are given twice: give each once", param="weights")
    return points


def _grid(objectives: Sequence[str], points: int) -> list[Weights]:
    if points < 2:
        raise InvalidRequest("an even grid needs both ends: give 2 weights or more", param="weights")
    first, second = objectives
    steps = points - 1
    return [{first: step / steps, second: (steps - step) / steps} for step in range(points)]


def shown(address: str) -> str:
    """A judge's address without what may be secret in it."""
    if not address.startswith(("http://", "https://")):
        return address
    try:
        return str(httpx.URL(address).copy_with(userinfo=b"", query=None))
    except httpx.InvalidURL:
        return address
