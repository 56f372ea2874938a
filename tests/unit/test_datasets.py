from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sipo.datasets import bundled_eval_prompts, bundled_examples, read_examples, read_lines, read_source
from sipo.errors import InvalidData, NotFound
from sipo.evaluation.ground_truth import REWARDS
from sipo.preferences import Example

OURS: list[dict[str, Any]] = [
    {"prompt": "Hi", "response_0": "Yo", "response_1": "Hello!", "labels": {"polite": 1, "brief": 0}, "source": "ours"},
    {"prompt": "Bye", "response_0": "See you", "response_1": "Go", "labels": {"polite": 0}},
]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_jsonl(path: Path) -> None:
    path.write_text(jsonl(OURS))


def write_array(path: Path) -> None:
    path.write_text(json.dumps(OURS, indent=2))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(jsonl(OURS).encode()))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.json", write_array), ("lines.json", write_jsonl), ("a.jsonl.gz", write_gzip)],
)
def test_our_schema_is_read_from_every_kind_of_file(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    reading = read_source(tmp_path / name)
    assert reading.format == "sipo"
    assert reading.examples == [Example(**row) for row in OURS]


def test_parquet_with_our_nested_labels_gives_each_row_its_own(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(OURS), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet") == [Example(**row) for row in OURS]


def test_response_ids_of_safe_rlhf_become_labels_where_they_are(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": None, "safer_response_id": 1},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    reading = read_source(tmp_path / "a.parquet")
    assert reading.format == "safe-rlhf"
    assert [example.labels for example in reading.examples] == [{"helpful": 1, "harmless": 0}, {"harmless": 1}]


def test_a_hub_name_is_read_through_datasets_and_may_name_its_split(tmp_path: Path) -> None:
    # datasets takes a folder where it takes a hub name.
    (tmp_path / "train.jsonl").write_text(jsonl(OURS[:1]))
    (tmp_path / "test.jsonl").write_text(jsonl(OURS[1:]))
    assert [example.prompt for example in read_examples(str(tmp_path))] == ["Hi"]
    assert [example.prompt for example in read_examples(f"{tmp_path}:test")] == ["Bye"]


def test_an_unknown_split_and_a_missing_file_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(jsonl(OURS))
    with pytest.raises(NotFound, match="hub name"):
        read_examples(f"{tmp_path}:nope")
    with pytest.raises(NotFound, match="there is no file"):
        read_examples(tmp_path / "nope.jsonl")


def test_an_upload_is_read_from_bytes_and_from_lines_past_blank_ones() -> None:
    text = jsonl(OURS[:1]) + "\n" + jsonl(OURS[1:])
    assert read_lines(text.encode()) == read_lines(text.split("\n")) == [Example(**row) for row in OURS]


def test_a_line_separator_inside_a_text_does_not_end_the_line() -> None:
    row = {**OURS[0], "prompt": "one\u2028two"}
    assert read_lines(json.dumps(row, ensure_ascii=False).encode())[0].prompt == "one\u2028two"


def test_helpsteer_responses_become_pairs_whose_ties_carry_no_label() -> None:
    def row(prompt: str, response: str, helpfulness: int, verbosity: int) -> dict[str, Any]:
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity}

    rows = [
        row("p", "a", 3, 1),
        row("q", "lonely", 4, 4),
        row("p", "b", 4, 0),
        row("p", "c", 4, 1),
        row("r", "x", 2, 2),
        row("r", "y", 2, 2),
    ]
    reading = read_source_of(rows)
    assert [(example.response_0, example.response_1, example.labels) for example in reading.examples] == [
        ("a", "b", {"helpfulness": 1, "verbosity": 0}),
        ("a", "c", {"helpfulness": 1}),
        ("b", "c", {"verbosity": 1}),
    ]
    assert reading.left_out == {"a prompt with one response only": 1, "a pair with equal scores throughout": 1}


def read_source_of(rows: list[dict[str, Any]]) -> Any:
    from sipo.datasets.formats import examples_of

    return examples_of(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "`prompt` is ''.*not empty"),
        ({"response_0": None}, "`response_0` is None: it must be text"),
        ({"labels": {}}, "name at least one objective"),
        ({"labels": [0, 1]}, "name at least one objective"),
        ({"labels": {"polite": 2}}, "the label of 'polite' is 2: it must be 0 .* or 1"),
        ({"labels": {"polite": "1"}}, "the label of 'polite' is '1'"),
        ({"labels": {"very polite": 1}}, "'very polite' has no usable name"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_would_be_right(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidData, match=f"^line 3: .*{message}") as caught:
        read_lines(jsonl([*OURS, {**OURS[0], **change}]).encode())
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p"', "not JSON"),
        (b'["prompt"]', "a JSON list: each row must be an object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "p", "response_0": "a", "labels": {"polite": 1}}', "`response_1` is missing"),
    ],
)
def test_a_line_that_is_no_row_is_named(line: bytes, message: str) -> None:
    with pytest.raises(InvalidData, match=f"^line 3: {message}"):
        read_lines(jsonl(OURS).encode() + line)


def test_unknown_columns_are_answered_with_the_formats_that_are_known() -> None:
    with pytest.raises(InvalidData, match=r"^line 1: the columns 'question', 'answer' .* labels.*PKU-SafeRLHF.*HelpSteer"):
        read_lines(b'{"question": "q", "answer": "a"}')


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(InvalidData, match="empty"):
        read_lines(b"\n")


def test_a_helpsteer_score_that_is_no_number_is_named() -> None:
    with pytest.raises(InvalidData, match=r"^line 1: `coherence` is 'high'"):
        read_lines(b'{"prompt": "p", "response": "r", "coherence": "high"}')


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl.gz", b"no gzip"), ("a.parquet", b"no parquet"), ("a.json", b'[{"prompt": }]')]
)
def test_a_broken_file_is_invalid_data(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData):
        read_examples(tmp_path / name)


def test_the_bundled_splits_share_no_prompt_and_make_the_whole() -> None:
    splits = [bundled_examples("train"), bundled_examples("validation"), bundled_examples("test")]
    prompts = [{example.prompt for example in split} for split in splits]
    assert sum(map(len, splits)) == len(bundled_examples()) == len(set.union(*prompts))
    assert all(len(split) > 20 for split in splits)


def test_the_bundled_labels_are_those_of_the_ground_truth() -> None:
    for example in bundled_examples():
        scores = {
            name: (reward(example.prompt, example.response_0), reward(example.prompt, example.response_1))
            for name, reward in REWARDS.items()
        }
        assert example.labels == {name: int(second > first) for name, (first, second) in scores.items()}


def test_between_40_and_60_percent_of_the_bundled_pairs_conflict() -> None:
    examples = bundled_examples()
    assert 0.4 < sum(example.conflicting() for example in examples) / len(examples) < 0.6


def test_position_says_nothing_about_the_bundled_labels() -> None:
    examples = bundled_examples()
    for objective in REWARDS:
        assert 0.4 < sum(example.labels[objective] for example in examples) / len(examples) < 0.6


def test_the_evaluation_prompts_are_300_others() -> None:
    prompts = bundled_eval_prompts()
    assert len(prompts) == len(set(prompts)) == 300
    assert not set(prompts) & {example.prompt for example in bundled_examples()}
