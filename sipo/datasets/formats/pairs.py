"""A chosen and a rejected response a row, in the several ways in which they are written; and answers without any preference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sipo.conversation import Message, Prompt
from sipo.datasets.dataset import Answers, Pair
from sipo.datasets.formats.labelled import check_name, labels_in
from sipo.datasets.rows import Row, short
from sipo.datasets.turns import TRANSCRIPT, messages_in, prompt_in, prompt_of, transcript
from sipo.words import counted

TRANSCRIPT_START = "\n\nHuman:"


def read_pairs(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Pair]]:
    """The prompt is in a column of its own, or is what stands before the last turn of both."""
    for row in rows:
        chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
        objective = row.get("objective")
        if objective is not None:
            check_name(row, row.text("objective"))
        if chosen is None or rejected is None:
            left_out["rows whose transcripts do not end with an answer to the user"] += 1
        elif chosen[0] != rejected[0]:
            left_out["rows whose chosen and rejected differ before the last answer"] += 1
        else:
            yield row.line, Pair(prompt=chosen[0], chosen=chosen[1], rejected=rejected[1], objective=objective)


def read_answers(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Answers]]:
    for row in rows:
        responses = row.get("responses")
        if not isinstance(responses, list) or not responses:
            raise row.wrong(f"`responses` is {short(responses)}: it must be a list of one text or more")
        texts = [row.as_text(f"responses[{index}]", text) for index, text in enumerate(responses)]
        given = row.get("labels")
        labels = labels_in(row, given) if isinstance(given, dict) and any(label is not None for label in given.values()) else None
        if given is not None and not isinstance(given, dict):
            raise row.wrong(f'`labels` is {short(given)}: it must name objectives, such as {{"helpful": 1}}')
        if labels and len(texts) != 2:
            raise row.wrong(f"`labels` are given for {counted(len(texts), 'response')}: only of two can one be preferred")
        yield row.line, Answers(prompt=prompt_in(row), responses=texts, labels=labels)


def _side(row: Row, column: str) -> tuple[Prompt, str] | None:
    """Prompt and answer. None for a transcript that is no answer to the user: a public set has a few."""
    value = row.get(column)
    if not isinstance(value, str):
        return _side_of_messages(row, column)
    if _has_prompt(row) and not value.startswith(TRANSCRIPT_START):
        return _given_prompt(row), value
    turns = transcript(value)
    if not turns:
        raise row.wrong(f"a prompt is missing: add a column `prompt`, or make `{column}` a transcript such as {TRANSCRIPT}")
    *before, answer = turns
    if answer.role != "assistant" or not before or before[-1].role != "user" or not before[-1].content:
        return None
    return prompt_of(row, column, before), answer.content


def _side_of_messages(row: Row, column: str) -> tuple[Prompt, str]:
    if row.get(column) is None:
        raise row.wrong(f"`{column}` is missing: it must be text or a list of messages")
    messages = messages_in(row, column)
    if not messages or messages[-1].role != "assistant":
        raise row.wrong(f"the last message of `{column}` must be the assistant's answer")
    *before, answer = messages
    return (prompt_of(row, column, before) if before else _given_prompt(row)), answer.content


def _has_prompt(row: Row) -> bool:
    return row.get("prompt") is not None or row.get("conversations") is not None


def _given_prompt(row: Row) -> Prompt:
    """Of the column `prompt`, which may be a transcript that waits for its answer, or of ShareGPT's `conversations`."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.startswith(TRANSCRIPT_START):
        turns = transcript(prompt)
        waits = Message(role="assistant", content="")
        return prompt_of(row, "prompt", turns[:-1] if turns[-1] == waits else turns)
    return prompt_in(row, "conversations" if prompt is None and _has_prompt(row) else "prompt")
