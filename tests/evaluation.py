"""Plans of evaluations over a base that nothing is generated with, and an engine that answers by rote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from sipo.decoding import Response
from sipo.evaluation.methods import Adapter, Method
from sipo.evaluation.plan import Plan, points_of
from sipo.evaluation.prompts import TestPrompt
from sipo.evaluation.report import Kind
from sipo.models import Base, BaseModelRef
from sipo.preferences import Weights, format_weights
from sipo.prompts import PromptFormat

OBJECTIVES = ["concise", "warm"]
JUDGES = {"concise": "python:concise", "warm": "python:warm"}
RAW = PromptFormat(kind="raw", template="{prompt}\n")


def method_of(
    base: Path,
    kind: Kind,
    name: str | None = None,
    *,
    adapters: str = "demo",
    reference: str | None = None,
    points: Sequence[Weights] | None = None,
) -> Method:
    """`adapters` and `reference` stand for the set's files: methods of the same ones may share an engine."""
    weights = points or points_of(OBJECTIVES, ["3"])
    keys = {"base": [], "reference": [], "models": list(map(format_weights, weights))}.get(kind, OBJECTIVES)
    return Method(
        name=name or kind,
        kind=kind,
        source=adapters,
        base=Base(base, BaseModelRef(name="tiny", sha256="0" * 64)),
        prompt_format=RAW,
        points=[None] if kind in ("base", "reference") else weights,
        adapters={key: Adapter(Path(adapters, key), f"{adapters} {key}", rank) for rank, key in enumerate(keys, start=2)},
        reference=Adapter(Path(reference), reference, 4) if reference else None,
    )


def plan_of(methods: Sequence[Method], prompts: int = 4, *, judges: Mapping[str, str] = JUDGES, originals: bool = False) -> Plan:
    asked = [
        TestPrompt(prompt=f"What is {index}?", originals=(f"It is {index}.", "Nothing") if originals else None)
        for index in range(prompts)
    ]
    return Plan("front", asked, methods, judges, max_tokens=8)


class FakeEngine:
    """Opens as an OfflineDecoder does. Each answer says how it was asked for; `started` has each engine's arguments, `batches`
    the sizes of what it was asked. After `most` batches it is killed."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.started: list[dict[str, Any]] = []
        self.batches: list[int] = []

    def open(
        self, model: Path, policies: Mapping[str, Path], *, reference: Path | None, **sizes: int
    ) -> AbstractContextManager[FakeEngine]:
        self.started.append({"model": model, "policies": dict(policies), "reference": reference, **sizes})
        return nullcontext(self)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        weights: Sequence[Mapping[str, float]] | None = None,
        *,
        mode: str,
        temperature: float,
        max_tokens: int,
    ) -> list[Response]:
        assert temperature == 0
        if len(self.batches) == self.most:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        each = [{}] * len(prompts) if weights is None else [dict(one) for one in weights]
        return [
            Response(f"{mode} {format_weights(one)} {len(ids)}", list(range(5)), one, "stop")
            for ids, one in zip(prompts, each, strict=True)
        ]


def silent(stage: str, done: int, of: int) -> None:
    pass
