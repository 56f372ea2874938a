"""The ways in which data sets write a conversation: message lists, transcripts, and HelpSteer2's marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from sipo.conversation import Message, Prompt, as_prompt
from sipo.datasets.rows import Row, short

Role = Literal["system", "user", "assistant"]

_ROLES: dict[object, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant"),
}
TRANSCRIPT = '"\\n\\nHuman: …\\n\\nAssistant: …"'

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TURN_MARK = re.compile(r"\n?<extra_id_1>(User|Assistant)(?:\n|\Z)")


def prompt_in(row: Row, column: str = "prompt") -> Prompt:
    """A text or a message list that ends with the user's turn. Raises InvalidData."""
    value = row.get(column)
    if value is None:
        raise row.wrong(f"`{column}` is missing: it must be text, not empty, or a list of messages")
    if isinstance(value, str):
        return prompt_of(row, column, [Message(role="user", content=value)])
    return prompt_of(row, column, messages_in(row, column))


def marked_prompt_in(row: Row) -> Prompt:
    """As prompt_in, of a text in which <extra_id_1>Assistant and <extra_id_1>User stand before all turns but the first."""
    value = row.get("prompt")
    if not isinstance(value, str):
        return prompt_in(row)
    first, *rest = _TURN_MARK.split(value)
    turns = _turns(["User", first, *rest])
    return prompt_of(row, "prompt", turns[:-1] if len(turns) > 1 and not turns[-1].content else turns)


def prompt_of(row: Row, column: str, turns: Sequence[Message]) -> Prompt:
    if not turns or turns[-1].role != "user":
        raise row.wrong(f"`{column}` does not end with the user's turn: nothing is asked")
    if not turns[-1].content.strip():
        raise row.wrong(f"`{column}` is {short(turns[-1].content)}: what the user asks must not be empty")
    return as_prompt(turns)


def messages_in(row: Row, column: str) -> list[Message]:
    """Of {"role", "content"}, or of {"from", "value"} as ShareGPT has them; a lone message is a list of one."""
    value = row.get(column)
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple):
        raise row.wrong(f"`{column}` is {short(value)}: it must be text or a list of messages")
    return [_message(row, f"{column}[{index}]", message) for index, message in enumerate(messages)]


def transcript(text: str) -> list[Message]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …", stripped; none if the text does not begin so."""
    before, *turns = _SPEAKER.split(text)
    return [] if before or turns[:1] != ["Human"] else _turns(turns, strip=True)


def _turns(parts: Sequence[str], strip: bool = False) -> list[Message]:
    """Of speakers and what they say, in turn."""
    speakers: dict[str, Role] = {"Human": "user", "User": "user", "Assistant": "assistant"}
    return [
        Message(role=speakers[speaker], content=text.strip() if strip else text)
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _message(row: Row, path: str, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise row.wrong(f"`{path}` is {short(message)}: it must be a message, with role and content")
    speaker, said = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
    role = message.get(speaker)
    if not isinstance(role, str) or role not in _ROLES:
        raise row.wrong(f"`{path}.{speaker}` is {short(role)}: it must be system, user or assistant")
    return Message(role=_ROLES[role], content=_content(row, f"{path}.{said}", message.get(said)))


def _content(row: Row, path: str, content: object) -> str:
    if not isinstance(content, list):
        return row.as_text(path, content)
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise row.wrong(f'`{path}[{index}]` is {short(part)}: only parts {{"type": "text", "text": …}} can be read')
    return "".join(part["text"] for part in content)
