"""What memory an evaluation needs where it runs, said before anything is generated.

Only what is certain is counted: the weights of the engine and of judges, and a KV cache. Judges are loaded one after the other,
once the last engine has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from sipo.errors import InvalidRequest
from sipo.evaluation.answers import engines
from sipo.evaluation.plan import Plan
from sipo.models import model_folder
from sipo.record import Record
from sipo.resources import Machine, classifier_memory, engine_memory, gib

CLASSIFIER = "hf:"


class Needs(Record):
    """In bytes, at the least."""

    device: str = Field(description="what it runs on")
    memory: int = Field(description="what it may take there")
    engine: int = Field(description="of weights and KV cache, of the largest engine")
    judges: dict[str, int] = Field(description="of the weights, by objective; functions and endpoints are not counted")

    def check(self) -> None:
        """Raises InvalidRequest, in one sentence, for what does not fit."""
        there = f"and the evaluation may take {gib(self.memory)} on {self.device}"
        if self.engine > self.memory:
            raise InvalidRequest(
                f"the engine needs {gib(self.engine)} for its weights and KV cache, {there}: take a smaller base model, fewer "
                "max_tokens, or a machine with more memory",
                param="methods",
            )
        for objective, needed in self.judges.items():
            if needed > self.memory:
                raise InvalidRequest(
                    f"the judge of {objective} needs {gib(needed)} for its weights alone, {there}: take a smaller one, or a "
                    "machine with more memory",
                    param="judges",
                )


def needs_of(plan: Plan, ids: Mapping[str, Sequence[Sequence[int]]], machine: Machine) -> Needs:
    """`ids`: every prompt's tokens, by method."""
    largest = max(
        engine_memory(
            engine.base,
            machine,
            slots=engine.slots,
            tokens=max(len(tokens) for method in engine.methods for tokens in ids[method.name]) + plan.max_tokens,
        )
        for engine in engines(plan.methods)
    )
    classifiers = {
        objective: classifier_memory(model_folder(address.removeprefix(CLASSIFIER).partition("#")[0]))
        for objective, address in plan.judges.items()
        if address.startswith(CLASSIFIER)
    }
    return Needs(device=machine.device, memory=machine.memory, engine=largest, judges=classifiers)
