"""The file of `sipo train`: labelled examples, or preference pairs as a job gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from gateway.cli.console import complaints
from sipo.datasets import read_source
from sipo.errors import InvalidData, InvalidRequest
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


def read_data(data: str) -> Labelled | Pairs:
    """The first row's columns tell which. Raises InvalidData for the first wrong line, NotFound if there is no such file."""
    try:
        if (pairs := _pairs(Path(data).expanduser())) is not None:
            return pairs
        reading = read_source(data)
    except OSError as error:
        raise InvalidRequest(f"cannot read {data}: {error}") from error
    for reason, count in reading.left_out.items():
        complaints.print(f"left out: {count} times {reason}")
    return Labelled(reading.examples)


def _pairs(path: Path) -> Pairs | None:
    """None if the first row has not both `chosen` and `rejected`: then it is labelled data, if anything."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    try:
        first = json.loads(lines[0][1]) if lines else {}
    except ValueError:
        return None
    if not isinstance(first, dict) or not {"chosen", "rejected"} <= first.keys():
        return None
    return Pairs([(number, _row(number, line)) for number, line in lines])


def _row(number: int, line: bytes) -> PairRow:
    try:
        return PairRow.model_validate_json(line)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in fault["loc"])
        raise InvalidData(f"{where}{fault['msg']}; a pair needs prompt, chosen and rejected, each a text", line=number) from error
