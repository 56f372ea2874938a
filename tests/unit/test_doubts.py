from __future__ import annotations

from sipo.datasets.doubts import doubtful_labels, doubtful_pairs
from sipo.preferences import Example


def example(response_0: str = "a", response_1: str = "b", **labels: int) -> Example:
    return Example.model_validate({"prompt": "x", "response_0": response_0, "response_1": response_1, "labels": labels})


def test_labels_that_nothing_is_wrong_with() -> None:
    assert doubtful_labels([example(concise=0, warm=1)] * 30, ["concise", "warm"]) == []
    assert doubtful_labels([example(concise=0)] * 30, ["concise"]) == []  # one objective alone cannot conflict anyway


def test_labels_that_look_wrong() -> None:
    rows = [*[example(helpful=0, harmless=1)] * 20, example(helpfull=1), example("a", "a", helpful=1, harmless=1)]
    assert doubtful_labels(rows, ["helpful", "harmless", "helpfull"]) == [
        "in 1 of 22 rows the two responses are the same",
        "1 of 22 rows has a label for one objective only, and cannot conflict",
        "only 1 of 22 rows has a label for 'helpfull': is 'helpful' meant?",
    ]


def test_pairs_that_look_wrong() -> None:
    assert doubtful_pairs([("x", "a", "b"), ("x", "a", "b"), ("y", "b", "a")]) == []
    assert doubtful_pairs([("x", "a", "b"), ("x", "b", "a"), ("x", "b", "a"), ("x", " ", "b")]) == [
        "in 1 of 4 pairs the preferred response is empty",
        "1 pair of 4 has a twin that prefers the other response",
    ]
