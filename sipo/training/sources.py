"""What runs are made from: labelled examples, or preference pairs as a job gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, Field

from sipo.errors import InvalidData
from sipo.preferences import Example, ObjectiveName
from sipo.training.data import TrainingPair


@dataclass(frozen=True)
class Labelled:
    examples: Sequence[Example]

    @property
    def objectives(self) -> list[str]:
        """In the order of their first labels."""
        return list(dict.fromkeys(name for example in self.examples for name in example.labels))


class PairRow(BaseModel):
    """A line of `GET /v1/jobs/{id}/pairs`. Without an objective it is for every policy; other columns are passed over."""

    prompt: str = Field(min_length=1)
    chosen: str
    rejected: str
    objective: ObjectiveName | None = None


@dataclass(frozen=True)
class Pairs:
    rows: Sequence[tuple[int, PairRow]]
    """With their line numbers."""

    def check_objectives(self, known: Sequence[str], owner: str) -> None:
        for line, row in self.rows:
            if row.objective not in (None, *known):
                raise InvalidData(f"`objective` is {row.objective!r}: {owner} has {', '.join(known)}", line=line)

    def of(self, objective: str) -> list[TrainingPair]:
        return [
            TrainingPair(prompt=row.prompt, chosen=row.chosen, rejected=row.rejected)
            for _, row in self.rows
            if row.objective in (None, objective)
        ]
