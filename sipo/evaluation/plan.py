"""What an evaluation is made of, settled before anything is generated: prompts, methods, weights and judges."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import httpx

from sipo.errors import InvalidRequest
from sipo.evaluation.methods import Method, Methods
from sipo.evaluation.prompts import TestPrompt, check_apart
from sipo.evaluation.report import SEED, family
from sipo.preferences import (
    Weights,
    check_objectives,
    format_weights,
    normalize_weights,
    one_hot_weights,
    parse_weights,
    sampling_weights,
)

POINTS = 6
"""Weights on the front of two objectives, as in the paper: 0, 0.2 … 1."""
EXAMPLE = "concise=python:concise"
JOINED = ("mod", "soup")
"""The kinds that answer at any weight."""
ON = "standardise_on"
EXACT = "python:"
"""How the address of a judge begins whose rewards count as they are: a function, of which 0 means something."""


@dataclass(frozen=True)
class Plan:
    """`judges`: the address of each objective's reward model; `also`: of further ones, by names of their own. `validation`: the
    prompts by the base's answers to which rewards are standardised, where those are not the test prompts themselves. `unseen`: the
    last points of every mixed or merged method, which count for no front."""

    name: str
    prompts: Sequence[TestPrompt]
    methods: Sequence[Method]
    judges: Mapping[str, str]
    max_tokens: int
    also: Mapping[str, str] = field(default_factory=dict)
    validation: Sequence[TestPrompt] = ()
    unseen: Sequence[Weights] = ()

    def __post_init__(self) -> None:
        """Raises InvalidRequest for methods and judges that do not fit together."""
        if len(self.prompts) < 2:
            raise InvalidRequest(f"intervals need 2 prompts or more: there are {len(self.prompts)}", param="prompts")
        if not self.methods:
            raise InvalidRequest("there is nothing to evaluate: name a method, such as base", param="methods")
        names = [method.name for method in self.methods]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequest(f"two methods are called {twice!r}: each needs a name of its own", param="methods")
        if seeded := next((name for name in names if SEED.fullmatch(name) and family(name) in names), None):
            raise InvalidRequest(
                f"{family(seeded)!r} is there with a seed and without: give each of its methods one, as {seeded}", param="methods"
            )
        if twice := next((name for name in self.also if name in self.judges), None):
            raise InvalidRequest(f"{twice!r} is an objective already: give the further judge another name", param="also")
        if self.inexact and self.base_method is None:
            raise InvalidRequest(
                f"the rewards of {self.inexact[0]} are counted from the base's, as their own zero means nothing: add base to the "
                "methods",
                param="methods",
            )
        if self.validation and not self.inexact:
            raise InvalidRequest("every judge is a function, whose rewards count as they are: nothing is standardised", param=ON)
        if len(self.validation) == 1:
            raise InvalidRequest("one validation prompt has no standard deviation: give more", param=ON)
        check_apart(self.prompts, self.validation)

    @property
    def objectives(self) -> list[str]:
        return list(self.judges)

    @property
    def inexact(self) -> list[str]:
        """The objectives whose judges' own zero means nothing."""
        return [objective for objective, address in self.judges.items() if not address.startswith(EXACT)]

    @property
    def all_judges(self) -> dict[str, str]:
        return {**self.judges, **self.also}

    @property
    def baseline(self) -> Method | None:
        """What side effects are told in terms of: the base, or else the first reference."""
        return self.base_method or next((method for method in self.methods if method.kind == "reference"), None)

    @property
    def validated(self) -> Plan | None:
        """What standardises, as an evaluation of its own: the base's answers to the validation prompts."""
        if not self.validation:
            return None
        assert self.base_method is not None, "checked"
        judges = {objective: self.judges[objective] for objective in self.inexact}
        return Plan(f"{self.name}, validation", self.validation, [self.base_method], judges, self.max_tokens)

    def seen(self, method: Method) -> int:
        """How many points of the method count: its first ones."""
        return len(method.points) - (len(self.unseen) if method.kind in JOINED else 0)

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
            "judges": {name: shown(address) for name, address in self.all_judges.items()},
            "max_tokens": self.max_tokens,
        }

    def identity_text(self) -> str:
        return json.dumps(self.identity(), indent=1, ensure_ascii=False) + "\n"


def open_methods(methods: Methods, texts: Sequence[str], unseen: Sequence[Weights] = ()) -> list[Method]:
    """Each of NAME=KIND:SOURCE, where NAME may end with the training's seed, as sipo@1; mixed and merged ones answer at the unseen
    weights as well. Raises as Methods.open does."""
    opened = []
    for text in texts:
        name, equals, spec = text.partition("=")
        method = replace(methods.open(f"{family(name)}={spec}"), name=name) if equals else methods.open(text)
        opened.append(replace(method, points=[*method.points, *unseen]) if method.kind in JOINED else method)
    return opened


def read_judges(texts: Sequence[str]) -> dict[str, str]:
    """Addresses by objective, of OBJECTIVE=ADDRESS each. Raises InvalidRequest."""
    judges = read_addresses(texts, "judges")
    if len(judges) < 2:
        raise InvalidRequest(f"a front has two objectives or more: give a judge for each, as {EXAMPLE}", param="judges")
    return judges


def read_addresses(texts: Sequence[str], param: str) -> dict[str, str]:
    """Judges' addresses by name, of NAME=ADDRESS each. Raises InvalidRequest."""
    judges: dict[str, str] = {}
    for text in texts:
        name, equals, address = text.partition("=")
        if not equals or not address:
            raise InvalidRequest(f"cannot read the judge {text!r}: write OBJECTIVE=ADDRESS, as {EXAMPLE}", param=param)
        check_objectives([name], param=param)
        if name in judges:
            raise InvalidRequest(f"{name!r} has two judges: give one for each objective", param=param)
        judges[name] = address
    return judges


def points_of(objectives: Sequence[str], texts: Sequence[str]) -> list[Weights]:
    """The weights at which every method answers: an even grid of so many for two objectives ("6"), or those given. By default a
    grid of POINTS; for more objectives the vertices, the uniform weights and the midpoints. Raises InvalidRequest."""
    if len(texts) <= 1 and (not texts or re.fullmatch(r"[0-9]{1,6}", texts[0])):
        if len(objectives) == 2:
            return _grid(objectives, int(texts[0]) if texts else POINTS)
        if texts:
            raise InvalidRequest(
                "a number of weights is for two objectives: of more, write each of them, or leave `weights` out for the vertices, "
                "the uniform weights and the midpoints",
                param="weights",
            )
        return [*(one_hot_weights(name, objectives) for name in objectives), *sampling_weights(objectives)]
    return _read_points(objectives, texts, "weights")


def unseen_of(objectives: Sequence[str], texts: Sequence[str], seen: Sequence[Weights]) -> list[Weights]:
    """Further weights, none of them among those `seen`: so many, in the middles of as many equal parts from one objective to the
    other ("5": 0.1, 0.3 … 0.9), or those given. Raises InvalidRequest."""
    if len(texts) == 1 and re.fullmatch(r"[0-9]{1,6}", texts[0]):
        if len(objectives) != 2 or int(texts[0]) < 1:
            raise InvalidRequest(
                "a number of unseen weights, 1 or more, is for two objectives: of more, write each", param="unseen"
            )
        (first, second), count = objectives, int(texts[0])
        points = [{first: (part + 0.5) / count, second: 1 - (part + 0.5) / count} for part in range(count)]
    else:
        points = _read_points(objectives, texts, "unseen")
    for point in points:
        if any(_same(point, other) for other in seen):
            raise InvalidRequest(f"the weights {format_weights(point)} are not unseen: they are measured anyway", param="unseen")
    return points


def _read_points(objectives: Sequence[str], texts: Sequence[str], param: str) -> list[Weights]:
    points = [normalize_weights(parse_weights(text, param=param), objectives, param=param) for text in texts]
    for index, point in enumerate(points):
        if any(_same(point, other) for other in points[:index]):
            raise InvalidRequest(f"the weights {texts[index]} are given twice: give each once", param=param)
    return points


def _same(point: Weights, other: Weights) -> bool:
    return all(math.isclose(point[name], other[name], abs_tol=1e-6) for name in point)


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
