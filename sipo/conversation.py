"""What a model is asked: a text, or the turns of a conversation that ends with the user's.

Data sets, messages between services and requests carry a `Prompt`; how it becomes tokens is sipo.prompts' alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from sipo.record import Record


class Message(Record):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def _one_way_to_write_it(turns: tuple[Message, ...]) -> str | tuple[Message, ...]:
    """A lone user's turn is its text, so that equal prompts are equal. Raises ValueError for what nobody could answer."""
    if not turns or turns[-1].role != "user" or not turns[-1].content:
        raise ValueError("a conversation ends with what the user says, and that is not empty")
    return turns[0].content if len(turns) == 1 else turns


def _read(value: Any, read: ValidatorFunctionWrapHandler) -> str | tuple[Message, ...]:
    """One fault of the whole field, in words, where a union would list what each of its kinds misses."""
    try:
        prompt: str | tuple[Message, ...] = read(value)
    except ValidationError as error:
        bad = next((f"message {fault['loc'][1]}, counted from 0, is none: " for fault in error.errors() if fault["loc"][1:]), "")
        raise ValueError(
            f"{bad}a prompt is a text, not empty, or a conversation: a list of messages, each with a role (system, user or "
            "assistant) and a text as its content"
        ) from error
    return prompt if isinstance(prompt, str) else _one_way_to_write_it(prompt)


Prompt = Annotated[
    Annotated[str, StringConstraints(min_length=1)] | tuple[Message, ...],
    WrapValidator(_read),
]
"""Hashable, and equal where it asks the same. In JSON a text, or a list of {"role", "content"}."""

JsonPrompt = str | list[dict[str, str]]
"""A Prompt as JSON has it."""


def as_prompt(prompt: str | Iterable[Message | Mapping[str, str]]) -> Prompt:
    """The Prompt that this text is, or that these turns are, which may be as JSON has them. Raises ValueError for turns that do not
    end with the user's."""
    if isinstance(prompt, str):
        return prompt
    return _one_way_to_write_it(tuple(Message.model_validate(turn) for turn in prompt))


def as_json(prompt: str | Sequence[Message]) -> JsonPrompt:
    """The inverse of as_prompt."""
    return prompt if isinstance(prompt, str) else as_messages(prompt)


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
