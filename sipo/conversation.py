"""What a model is asked: a text, or the turns of a conversation that ends with the user's.

Data sets, messages between services and requests carry a `Prompt`; how it becomes tokens is sipo.prompts' alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, StringConstraints

from sipo.record import Record


class Message(Record):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def _one_way_to_write_it(prompt: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    """A lone user's turn is its text, so that equal prompts are equal. Raises ValueError for what nobody could answer."""
    if isinstance(prompt, str):
        return prompt
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content:
        raise ValueError("a conversation ends with what the user says, and that is not empty")
    return prompt[0].content if len(prompt) == 1 else prompt


Prompt = Annotated[
    Annotated[str, StringConstraints(min_length=1)] | tuple[Message, ...],
    AfterValidator(_one_way_to_write_it),
]
"""Hashable, and equal where it asks the same. In JSON a text, or a list of {"role", "content"}."""


def as_prompt(turns: Sequence[Message]) -> str | tuple[Message, ...]:
    """The Prompt that these turns are. Raises ValueError for turns that do not end with the user's."""
    return _one_way_to_write_it(tuple(turns))


def as_messages(prompt: str | Sequence[Message]) -> list[dict[str, str]]:
    """As a chat server is asked."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def as_text(prompt: str | Sequence[Message]) -> str:
    """For people, and for models that know no chat: a conversation's turns, each with who says it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in prompt)
