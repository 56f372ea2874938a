"""Template sets: one YAML file per group of objectives, rendered as a chat or as one text from the same words.

The fixed part (instruction and in-context examples) always comes first and does not depend on the prompt, so that a decoder's
prefix cache computes it once for all prompts, and for all weights. This module knows no model and no service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from sipo.conversation import Message, as_text
from sipo.errors import InvalidRequest
from sipo.preferences import ObjectiveName

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

_PLACEHOLDER = re.compile(r"\{(objectives|prompt|response|review)\}")


@dataclass(frozen=True)
class Parsed:
    """What is left of an output. `text` is "" where nothing is left; `cut` says that a new example had begun and was cut off."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Task:
    """One prompt, ready for a decoder: an instruction, the examples as (user, assistant) turns, and the turn to answer."""

    system: str
    shots: tuple[tuple[str, str], ...]
    user: str
    lead: str
    marker: str

    def messages(self) -> list[dict[str, str]]:
        """The chat form. The decoder adds the assistant's header."""
        turns = [{"role": "system", "content": self.system}]
        for user, assistant in self.shots:
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": self._answer(assistant)}]
        return [*turns, {"role": "user", "content": self.user}]

    def text(self) -> str:
        """The raw form: one text to go on with. It ends where the answer begins."""
        blocks = [self.system, *(f"{user}\n{self._answer(answer)}" for user, answer in self.shots), f"{self.user}\n{self.lead}"]
        return "\n\n".join(blocks).rstrip()

    @property
    def stop(self) -> list[str]:
        """Strings after which an output is a new example and no answer any more: generation may stop there."""
        return [f"\n{self.marker}"]

    def parse(self, output: str) -> Parsed:
        """The answer alone: cut where a new example begins, without the lead-in that the model may have repeated."""
        answer, marker, _ = f"\n{output.strip()}".partition(self.stop[0])
        answer = answer.strip()
        if self.lead and answer.lower().startswith(self.lead.lower()):
            answer = answer[len(self.lead) :].strip()
        return Parsed(text=answer, cut=bool(marker))

    def _answer(self, answer: str) -> str:
        return f"{self.lead} {answer}" if self.lead else answer


class Shot(BaseModel):
    """One in-context example; the review task shows the review, the rewrite task all four."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text
    response: Text
    review: Text
    rewrite: Text


class Wording(BaseModel):
    """How a task is put: `system` stands first, `user` is the form of every turn, `lead` are the first words of every answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: Text
    user: Text
    lead: Annotated[str, StringConstraints(strip_whitespace=True)] = ""

    @property
    def marker(self) -> str:
        """The words that open every turn, and so mark where a new example begins."""
        return self.user.partition("{")[0].strip()


class TemplateSet(BaseModel):
    """A template file. Placeholders: {objectives} anywhere, {prompt}, {response} and {review} in the form of a user turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objectives: list[ObjectiveName] | None = Field(default=None, description="in any order; none: the set for all other objectives")
    review: Wording
    rewrite: Wording
    examples: list[Shot]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.objectives is not None and not 2 <= len(set(self.objectives)) == len(self.objectives):
            raise ValueError("objectives must be two or more different names, or absent in the general set")
        for name, wording, needed in (
            ("review", self.review, ("{prompt}", "{response}")),
            ("rewrite", self.rewrite, ("{prompt}", "{response}", "{review}")),
        ):
            if missing := [placeholder for placeholder in needed if wording.user.count(placeholder) != 1]:
                raise ValueError(f"{name}.user must contain {missing[0]} once")
            if "{review}" in self.review.user:
                raise ValueError("review.user cannot contain {review}: there is none yet")
            if not wording.marker:
                raise ValueError(f"{name}.user must begin with some words of its own, such as 'Question:': they mark a new example")
        return self

    def review_task(self, objectives: Sequence[str], prompt: str | Sequence[Message], response: str) -> Task:
        """[p_v, x, y^s] of Eq. 4."""
        return self._task("review", objectives, prompt=as_text(prompt), response=response)

    def rewrite_task(self, objectives: Sequence[str], prompt: str | Sequence[Message], response: str, review: str) -> Task:
        """[p_a, x, y^v, y^s] of Eq. 5."""
        return self._task("rewrite", objectives, prompt=as_text(prompt), response=response, review=review)

    def _task(self, kind: Literal["review", "rewrite"], objectives: Sequence[str], **asked: str) -> Task:
        wording = self.review if kind == "review" else self.rewrite
        named = {"objectives": name_objectives(objectives)}
        shots = [{part: _fill(text, named) for part, text in shot} for shot in self.examples]
        return Task(
            system=_fill(wording.system, named),
            shots=tuple((_fill(wording.user, named | shot), shot[kind]) for shot in shots),
            user=_fill(wording.user, named | asked),
            lead=_fill(wording.lead, named),
            marker=wording.marker,
        )


class TemplateBook:
    """The shipped template sets, and those of a folder, which come before shipped ones of the same objectives."""

    def __init__(self, folder: Path | None = None) -> None:
        with as_file(files(__package__) / "templates") as shipped:
            sets = _read_folder(shipped)
        if folder is not None:
            sets |= _read_folder(folder)
        self._sets = sets

    def find(self, objectives: Sequence[str]) -> TemplateSet:
        """The set for just these objectives, in any order, or else the general one."""
        return self._sets.get(frozenset(objectives)) or self._sets[None]


def name_objectives(objectives: Sequence[str]) -> str:
    """["correctness", "human_preference", "warm"] -> "correctness, human preference and warm"."""
    *first, last = [name.replace("_", " ") for name in objectives]
    return f"{', '.join(first)} and {last}" if first else last


def read_template_set(file: Path) -> TemplateSet:
    """Raises InvalidRequest, with the file's name, for a file that is no template set."""
    try:
        return TemplateSet.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise InvalidRequest(f"template file {file}: {error}") from error


def _read_folder(folder: Path) -> dict[frozenset[str] | None, TemplateSet]:
    if not folder.is_dir():
        raise InvalidRequest(f"no template folder {folder}: give a folder of *.yaml files")
    sets = [read_template_set(file) for file in sorted(folder.glob("*.yaml"))]
    return {None if one.objectives is None else frozenset(one.objectives): one for one in sets}


def _fill(template: str, values: Mapping[str, str]) -> str:
    """One pass, known names only: braces in a caller's text stay what they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
