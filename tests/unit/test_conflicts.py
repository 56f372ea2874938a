from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from sipo.datasets import PairConflict, conflict_report, read, subset
from sipo.errors import InvalidRequest
from sipo.preferences import Example


def example(prompt: str, **labels: Literal[0, 1]) -> Example:
    return Example(prompt=prompt, response_0="a", response_1="b", labels=labels)


EXAMPLES = [
    example("all agree", helpful=1, harmless=1, honest=1),
    example("one of three differs", helpful=1, harmless=0, honest=1),
    example("two conflict", helpful=0, harmless=1),
    example("two agree", helpful=0, honest=0),
    example("one label", harmless=1),
]


def test_the_report_counts_labels_and_conflicts_among_those_present() -> None:
    report = conflict_report(EXAMPLES)
    assert report.rows == 5
    assert report.labels == {"helpful": 4, "harmless": 4, "honest": 3}
    assert (report.comparable, report.conflicting, report.ratio) == (4, 2, 0.5)
    assert report.pairs == [
        PairConflict("helpful", "harmless", rows=3, conflicting=2),
        PairConflict("helpful", "honest", rows=3, conflicting=0),
        PairConflict("harmless", "honest", rows=2, conflicting=1),
    ]
    assert report.pairs[2].ratio == 0.5


def test_a_single_objective_has_no_pairs_and_no_conflict() -> None:
    report = conflict_report([EXAMPLES[4]])
    assert (report.pairs, report.comparable, report.ratio) == ([], 0, 0.0)


@pytest.mark.parametrize(("ratio", "conflicting"), [(0.0, 0), (0.5, 4), (0.75, 6), (1.0, 8)])
def test_a_subset_has_the_ratio_and_size_asked_for(ratio: float, conflicting: int) -> None:
    many = [example(f"{i}", helpful=1, harmless=int(i % 3 == 0)) for i in range(60)]  # type: ignore[arg-type]
    chosen = subset(many, ratio, 8, seed=1)
    assert len({row.prompt for row in chosen}) == 8
    assert sum(row.conflicting() for row in chosen) == conflicting
    assert chosen == subset(many, ratio, 8, seed=1)
    assert chosen != subset(many, ratio, 8, seed=2)
    assert chosen == sorted(chosen, key=many.index)


def test_a_subset_of_distinct_prompts_has_none_twice() -> None:
    """20 prompts have two conflicting rows each and an agreeing one."""
    many = [example(f"{i // 3}", helpful=1, harmless=int(i % 3 == 0)) for i in range(60)]  # type: ignore[arg-type]
    chosen = subset(many, 0.5, 8, seed=1, distinct_prompts=True)
    assert len({row.prompt for row in chosen}) == 8
    assert sum(row.conflicting() for row in chosen) == 4
    assert chosen == subset(many, 0.5, 8, seed=1, distinct_prompts=True) == sorted(chosen, key=many.index)
    with pytest.raises(InvalidRequest, match="22 conflicting and 0 other rows: there are"):
        subset(many, 1, 22, seed=1, distinct_prompts=True)


@pytest.mark.parametrize(
    ("ratio", "size", "message"),
    [(1.0, 3, "3 conflicting and 0 other rows: there are 2 and 2"), (1.5, 2, "from 0 to 1"), (0.5, 0, "1 or more")],
)
def test_a_subset_that_cannot_be_had_is_refused(ratio: float, size: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        subset(EXAMPLES, ratio, size)


# file, rows, conflict in percent, conflict of some pairs in percent: as published with the data.
PUBLISHED = [
    ("qa_feedback_dev_pref_vs_conciseness.jsonl", 401, 54.4, {}),
    ("xstest_unsafe_conflict.jsonl", 361, 100.0, {("helpfulness", "harmlessness"): 100.0}),
    ("data2text_sf_pairs.jsonl", 567, 18.9, {("informativeness", "naturalness"): 18.9}),
    ("alpacaeval1_quality_vs_conciseness.jsonl", 1668, 81.2, {}),
    ("ultrafeedback_overall_vs_conciseness.jsonl", 362, 48.3, {}),
    (
        "dialsummeval_pairs.jsonl",
        2779,
        52.1,
        {
            ("coherence", "consistency"): 38.1,
            ("coherence", "fluency"): 21.1,
            ("coherence", "relevance"): 41.5,
            ("consistency", "fluency"): 36.6,
            ("consistency", "relevance"): 8.3,
            ("fluency", "relevance"): 38.1,
        },
    ),
]


@pytest.mark.skipif("SIPO_TEST_DATA" not in os.environ, reason="SIPO_TEST_DATA, the folder of real preference data, is not set")
@pytest.mark.parametrize(("name", "rows", "percent", "pairs"), PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_real_data_gives_the_published_conflict_ratios(
    name: str, rows: int, percent: float, pairs: dict[tuple[str, str], float]
) -> None:
    report = conflict_report(read(Path(os.environ["SIPO_TEST_DATA"]) / name, held_out=True).labelled())
    assert report.rows == rows
    assert round(100 * report.ratio, 1) == percent
    found = {frozenset((pair.first, pair.second)): round(100 * pair.ratio, 1) for pair in report.pairs}
    assert {frozenset(pair): value for pair, value in pairs.items()}.items() <= found.items()
