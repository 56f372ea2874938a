"""What looks wrong in a data set that can be read: told before anything is trained on it, as a sentence each, and never refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from sipo.conversation import Message
from sipo.preferences import Example
from sipo.words import counted, share

RARE = 20
"""An objective with so many times fewer labels than the most frequent one may be a name that was written wrong."""


def doubts(examples: Sequence[Example], objectives: Sequence[str]) -> list[str]:
    """All that looks wrong in labelled examples, for these objectives."""
    said = doubtful_labels(examples, objectives)
    for name in objectives:
        pairs = ((example.prompt, *example.chosen_rejected(name)) for example in examples if name in example.labels)
        said += [f"{name}: {sentence}" for sentence in doubtful_pairs(pairs)]
    return said


def doubtful_labels(examples: Sequence[Example], objectives: Sequence[str]) -> list[str]:
    """Of the labels of these objectives: equal responses, rows that speak of one objective only, names that are rare."""
    rows = len(examples)
    labels = Counter(name for example in examples for name in example.labels if name in objectives)
    same = sum(example.response_0 == example.response_1 for example in examples)
    single = sum(sum(name in example.labels for name in objectives) == 1 for example in examples)
    said = []
    if same:
        said.append(f"in {share(same, rows, 'row')} the two responses are the same")
    if len(labels) > 1 and single:
        said.append(f"{share(single, rows, 'row')} {_have(single)} a label for one objective only, and cannot conflict")
    for name, count in labels.items():
        if count * RARE <= max(labels.values()):
            others = [other for other in labels if other != name]
            meant = get_close_matches(name, others, n=1)
            hint = f": is {meant[0]!r} meant?" if meant else ""
            said.append(f"only {share(count, rows, 'row')} {_have(count)} a label for {name!r}{hint}")
    return said


def doubtful_pairs(pairs: Iterable[tuple[str | Sequence[Message] | Sequence[dict[str, str]], str, str]]) -> list[str]:
    """Of one objective's (prompt, chosen, rejected): chosen responses that are empty, and pairs that are there in both orders."""
    seen = Counter((repr(prompt), chosen, rejected) for prompt, chosen, rejected in pairs)
    total = seen.total()
    empty = sum(count for (_, chosen, rejected), count in seen.items() if not chosen.strip() and rejected.strip())
    contradicting = sum(
        min(count, seen[prompt, rejected, chosen]) for (prompt, chosen, rejected), count in seen.items() if chosen < rejected
    )
    said = []
    if empty:
        said.append(f"in {share(empty, total, 'pair')} the preferred response is empty")
    if contradicting:
        said.append(f"{counted(contradicting, 'pair')} of {total} {_have(contradicting)} a twin that prefers the other response")
    return said


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
