"""Answers that were judged one by one; every two to the same prompt that were judged differently become an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from sipo.conversation import Prompt
from sipo.datasets.formats.labelled import check_name
from sipo.datasets.rows import Row, short
from sipo.datasets.turns import marked_prompt_in, prompt_in
from sipo.preferences import Example, is_finite_number

HELPSTEER_SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class Scored:
    line: int
    response: str
    scores: Mapping[str, float]


def read_helpsteer(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    by_prompt: dict[Prompt, list[Scored]] = {}
    for row in rows:
        scores = {name: score for name in HELPSTEER_SCORES if (score := row.number(name)) is not None}
        by_prompt.setdefault(marked_prompt_in(row), []).append(Scored(row.line, row.text("response"), scores))
    for prompt, answers in by_prompt.items():
        yield from _compared(prompt, answers, left_out)


def read_ultrafeedback(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    """Every aspect with a numeric rating is an objective."""
    for row in rows:
        completions = row.get("completions")
        if not isinstance(completions, list):
            raise row.wrong(f"`completions` is {short(completions)}: it must be a list of rated responses")
        answers = [_completion(row, f"completions[{index}]", completion) for index, completion in enumerate(completions)]
        prompt = prompt_in(row, "instruction" if row.get("instruction") is not None else "prompt")
        yield from _compared(prompt, answers, left_out)


def read_beavertails(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    """Each safe answer with each unsafe one to the same prompt. Several people marked the same answer: most of them are right."""
    by_prompt: dict[Prompt, dict[str, list[Row]]] = {}
    for row in rows:
        if row.get("is_safe") not in (True, False):
            raise row.wrong(f"`is_safe` is {short(row.get('is_safe'))}: it must be true or false")
        by_prompt.setdefault(prompt_in(row), {}).setdefault(row.text("response"), []).append(row)
    for prompt, answers in by_prompt.items():
        # Votes for safe less votes for unsafe.
        votes = {text: sum(1 if row.get("is_safe") else -1 for row in marked) for text, marked in answers.items()}
        if undecided := sum(vote == 0 for vote in votes.values()):
            left_out["answers marked safe as often as unsafe"] += undecided
        pairs = [(safe, unsafe) for safe in votes for unsafe in votes if votes[safe] > 0 > votes[unsafe]]
        if not pairs:
            left_out["prompts without both a safe and an unsafe answer"] += 1
        for safe, unsafe in pairs:
            line = min(answers[safe][0].line, answers[unsafe][0].line)
            yield line, Example(prompt=prompt, response_0=safe, response_1=unsafe, labels={"harmless": 0})


def _compared(prompt: Prompt, answers: Sequence[Scored], left_out: Counter[str]) -> Iterator[tuple[int, Example]]:
    """Of every score that both answers have, the higher one is better; equal ones give no label."""
    if len(answers) < 2:
        left_out["prompts with one response only"] += 1
    for first, second in combinations(answers, 2):
        both = [name for name in first.scores if name in second.scores and first.scores[name] != second.scores[name]]
        labels: dict[str, Literal[0, 1]] = {name: 1 if second.scores[name] > first.scores[name] else 0 for name in both}
        if labels:
            yield first.line, Example(prompt=prompt, response_0=first.response, response_1=second.response, labels=labels)
        else:
            left_out["pairs with equal scores throughout"] += 1


def _completion(row: Row, path: str, completion: object) -> Scored:
    if not isinstance(completion, Mapping):
        raise row.wrong(f"`{path}` is {short(completion)}: it must be an object with response and annotations")
    response = row.as_text(f"{path}.response", completion.get("response"))
    column = "annotations" if completion.get("annotations") is not None else "ratings"
    ratings = completion.get(column) or {}
    if not isinstance(ratings, Mapping):
        raise row.wrong(f'`{path}.{column}` is {short(ratings)}: it must name aspects, such as {{"helpfulness": {{"Rating": 4}}}}')
    scores = {str(aspect): rating for aspect, value in ratings.items() if (rating := _rating(value)) is not None}
    for aspect in scores:
        check_name(row, aspect)
    return Scored(row.line, response, scores)


def _rating(value: Any) -> float | None:
    """None for "N/A", and whatever else is no number."""
    rating = value.get("Rating") if isinstance(value, Mapping) else value
    if isinstance(rating, str):
        try:
            rating = float(rating)
        except ValueError:
            return None
    return rating if is_finite_number(rating) else None
