"""What a data set is when it has been read: labelled examples, pairs, or answers; and what each can serve as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sipo.conversation import Prompt
from sipo.errors import InvalidData
from sipo.preferences import Example, ObjectiveName, check_objectives

Labels = dict[ObjectiveName, Literal[0, 1]]


class Pair(BaseModel):
    """Two responses, of which one is preferred, by `objective` if that is named."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: Prompt
    chosen: str
    rejected: str
    objective: ObjectiveName | None = None


class Answers(BaseModel):
    """Responses to score. `labels`, as an Example's, only where there are exactly two."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: Prompt
    responses: list[str] = Field(min_length=1)
    labels: Labels | None = None


@dataclass(frozen=True)
class Dataset:
    """`lines` has the line of each row; where rows were joined, of the first of them. `left_out` counts what became no row, by
    reason."""

    format: str
    rows: Sequence[Example] | Sequence[Pair] | Sequence[Answers]
    lines: Sequence[int]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def labelled(self) -> list[Example]:
        """Pairs that name their objective become examples whose response_0 is the chosen one; those of the same two responses,
        each with an objective of its own, become one example. Raises InvalidData for rows without any objective."""
        examples: list[Example] = []
        same: dict[object, list[int]] = {}
        for line, row in self._numbered():
            if isinstance(row, Pair):
                _join(examples, same.setdefault((row.prompt, frozenset((row.chosen, row.rejected))), []), line, row)
            else:
                examples.append(_example(line, row))
        return examples

    def of_objective(self, objective: str) -> Dataset:
        """The pairs, which all prefer by this objective. Raises InvalidData if they say otherwise, or are no pairs."""
        check_objectives([objective])
        pairs: list[Pair] = []
        for line, row in self._numbered():
            if isinstance(row, Example):
                raise InvalidData(
                    f"labelled data names its objectives itself: give the file alone, without {objective}=", line=line
                )
            if isinstance(row, Answers):
                raise InvalidData(f"answers without a preference: for {objective} a row needs chosen and rejected", line=line)
            if row.objective not in (None, objective):
                raise InvalidData(f"`objective` is {row.objective!r}: the file was given as {objective}'s", line=line)
            pairs.append(row.model_copy(update={"objective": objective}))
        return replace(self, rows=pairs)

    def answers(self) -> list[Answers]:
        """Everything can be scored: an example's two responses, a pair's chosen and rejected."""
        return [answers_of(row) for row in self.rows]

    def _numbered(self) -> Iterator[tuple[int, Example | Pair | Answers]]:
        return zip(self.lines, self.rows, strict=True)


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """Several files of the same kind as one. Raises InvalidData for examples beside pairs or answers, and so on."""
    kinds = list(dict.fromkeys(type(row) for dataset in datasets for row in dataset.rows))
    if len(kinds) > 1:
        names = {Example: "labelled examples", Pair: "pairs", Answers: "answers"}
        raise InvalidData(f"{' and '.join(names[kind] for kind in kinds)} cannot be joined: give files of the same kind")
    left_out: Counter[str] = Counter()
    for dataset in datasets:
        left_out.update(dataset.left_out)
    return Dataset(
        format=", ".join(dict.fromkeys(dataset.format for dataset in datasets)),
        rows=[row for dataset in datasets for row in dataset.rows],  # type: ignore[arg-type]  # all of one kind
        lines=[line for dataset in datasets for line in dataset.lines],
        left_out=dict(left_out),
    )


def _join(examples: list[Example], same: list[int], line: int, pair: Pair) -> None:
    """Adds the pair's label to the first example of `same` that lacks it, or makes an example of the pair."""
    if pair.objective is None:
        raise InvalidData("a pair without an objective: name each file's, as helpful=FILE, or add a column `objective`", line=line)
    for index in same:
        example = examples[index]
        if pair.objective not in example.labels:
            labels = {**example.labels, pair.objective: int(pair.chosen != example.response_0)}
            examples[index] = example.model_copy(update={"labels": labels})
            return
    same.append(len(examples))
    labels = {pair.objective: 0}
    examples.append(Example(prompt=pair.prompt, response_0=pair.chosen, response_1=pair.rejected, labels=labels))


def _example(line: int, row: Example | Answers) -> Example:
    if isinstance(row, Example):
        return row
    if row.labels is None:
        raise InvalidData('answers without labels: give two of them and labels, such as {"helpful": 1}', line=line)
    first, second = row.responses
    return Example(prompt=row.prompt, response_0=first, response_1=second, labels=row.labels)


def answers_of(row: Example | Pair | Answers) -> Answers:
    if isinstance(row, Answers):
        return row
    if isinstance(row, Example):
        return Answers(prompt=row.prompt, responses=[row.response_0, row.response_1], labels=row.labels)
    labels: Labels | None = {row.objective: 0} if row.objective else None
    return Answers(prompt=row.prompt, responses=[row.chosen, row.rejected], labels=labels)
