from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sipo.conversation import Message
from sipo.datasets import (
    Answers,
    Dataset,
    Pair,
    joined,
    read,
    read_rows,
    read_upload,
)
from sipo.errors import InvalidData, InvalidRequest, NotFound
from sipo.preferences import Example

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, «you»!"},
    {"role": "user", "content": "Which river?"},
]
CONVERSATION = tuple(Message(**turn) for turn in TURNS)
MARKED = "Hi\n<extra_id_1>Assistant\nHello, «you»!\n<extra_id_1>User\nWhich river?"
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello, «you»!\n\nHuman: Which river?\n\nAssistant:"


def example(prompt: Any, first: str, second: str, **labels: Any) -> Example:
    return Example(prompt=prompt, response_0=first, response_1=second, labels=labels)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def scored(prompt: str, response: str, helpfulness: int | None, verbosity: int) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity}


def rated(response: str, **ratings: str) -> dict[str, Any]:
    return {"response": response, "annotations": {aspect: {"Rating": rating} for aspect, rating in ratings.items()}}


@dataclass(frozen=True)
class Case:
    """Rows as a public set has them, and what they are read as."""

    format: str
    rows: list[dict[str, Any]]
    read: list[Any]
    left_out: dict[str, int]


CASES = {
    "ours": Case(
        "sipo",
        [
            {"prompt": "Hi", "response_0": "[Yo]", "response_1": "a\nb\u2028c\x85d", "labels": {"polite": 1, "brief": 0}},
            {"prompt": "[Bye]", "response_0": "", "response_1": "Go", "labels": {"polite": 0, "brief": None}},
        ],
        [example("Hi", "[Yo]", "a\nb\u2028c\x85d", polite=1, brief=0), example("[Bye]", "", "Go", polite=0)],
        {},
    ),
    "ours, of a conversation": Case(
        "sipo",
        [{"prompt": TURNS, "response_0": "a", "response_1": "b", "labels": {"polite": 1}}],
        [example(CONVERSATION, "a", "b", polite=1)],
        {},
    ),
    "PKU-SafeRLHF": Case(
        "safe-rlhf",
        [
            {"prompt": prompt, "response_0": "a", "response_1": "b", "better_response_id": better, "safer_response_id": safer}
            for prompt, better, safer in [("p", 1, 0), ("q", None, 1)]
        ],
        [example("p", "a", "b", helpful=1, harmless=0), example("q", "a", "b", harmless=1)],
        {},
    ),
    "BeaverTails": Case(
        "beavertails",
        [
            {"prompt": prompt, "response": response, "category": {"violence,incitement": not safe}, "is_safe": safe}
            for prompt, response, safe in [
                *[("p", "bad", False), ("p", "good", True), ("p", "fine", True), ("q", "lonely", True)],
                *[("p", "bad", True), ("p", "bad", False), ("p", "unclear", True), ("p", "unclear", False)],
            ]
        ],
        [example("p", "good", "bad", harmless=0), example("p", "fine", "bad", harmless=0)],
        {"answers marked safe as often as unsafe": 1, "prompts without both a safe and an unsafe answer": 1},
    ),
    "HelpSteer2": Case(
        "helpsteer",
        [
            *[scored(MARKED, "a", 3, 1), scored("q", "lonely", 4, 4), scored(f"{MARKED}\n<extra_id_1>Assistant\n", "b", 4, 0)],
            *[scored(MARKED, "c", None, 1), scored("r", "x", 2, 2), scored("r", "y", 2, 2)],
        ],
        [example(CONVERSATION, "a", "b", helpfulness=1, verbosity=0), example(CONVERSATION, "b", "c", verbosity=1)],
        {"prompts with one response only": 1, "pairs with equal scores throughout": 2},
    ),
    "HelpSteer2-Preference": Case(
        "helpsteer2-preference",
        [
            {"prompt": prompt, "response_1": "a", "response_2": "b", "preference_strength": strength, "split": "train"}
            for prompt, strength in [(MARKED, -2), ("q", 3), ("r", 0)]
        ],
        [example(CONVERSATION, "a", "b", helpfulness=0), example("q", "a", "b", helpfulness=1)],
        {"pairs of which neither response is preferred": 1},
    ),
    "HelpSteer3": Case(
        "helpsteer3",
        [{"domain": "general", "context": TURNS, "response1": "a", "response2": "b", "overall_preference": 1}],
        [example(CONVERSATION, "a", "b", helpfulness=1)],
        {},
    ),
    "UltraFeedback": Case(
        "ultrafeedback",
        [
            {
                "instruction": "p",
                "completions": [
                    rated("a", helpfulness="4", honesty="5", truthfulness="N/A"),
                    rated("b", helpfulness="2", honesty="5"),
                    rated("c", helpfulness="3.5", honesty="5", truthfulness="1"),
                    rated("d", helpfulness="3.5", honesty="5", truthfulness="1"),
                ],
            },
        ],
        [
            *[example("p", "a", "b", helpfulness=0), example("p", "a", "c", helpfulness=0), example("p", "a", "d", helpfulness=0)],
            *[example("p", "b", "c", helpfulness=1), example("p", "b", "d", helpfulness=1)],
        ],
        {"pairs with equal scores throughout": 1},
    ),
    "pairs as texts": Case(
        "pairs",
        [
            {"prompt": "p", "chosen": '["a"]', "rejected": "", "objective": "helpful"},
            {"prompt": "q", "chosen": "a", "rejected": "b", "objective": None},
        ],
        [Pair(prompt="p", chosen='["a"]', rejected="", objective="helpful"), Pair(prompt="q", chosen="a", rejected="b")],
        {},
    ),
    "pairs of texts, of a conversation": Case(
        "pairs",
        [{"prompt": TURNS, "chosen": "a", "rejected": "b"}],
        [Pair(prompt=CONVERSATION, chosen="a", rejected="b")],
        {},
    ),
    "pairs as transcripts": Case(
        "pairs",
        [
            {"chosen": f"{TRANSCRIPT} a", "rejected": f"{TRANSCRIPT} b"},
            {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: other\n\nAssistant: b"},
            {"chosen": "\n\nHuman: p\n\nAssistant: a\n\nHuman: q", "rejected": "\n\nHuman: p\n\nAssistant: b"},
        ],
        [Pair(prompt=CONVERSATION, chosen="a", rejected="b")],
        {
            "rows whose chosen and rejected differ before the last answer": 1,
            "rows whose transcripts do not end with an answer to the user": 1,
        },
    ),
    "pairs as message lists": Case(
        "pairs",
        [
            {"prompt": "not looked at", "chosen": [*TURNS, answer("a")], "rejected": [*TURNS, answer("b")]},
            {"prompt": "p", "chosen": [answer("a")], "rejected": [answer("b")]},
        ],
        [Pair(prompt=CONVERSATION, chosen="a", rejected="b"), Pair(prompt="p", chosen="a", rejected="b")],
        {},
    ),
    "answers": Case(
        "answers",
        [
            {"prompt": "p", "responses": ["a", "b"], "labels": {"polite": 1}},
            {"prompt": "q", "responses": ["a", "b", "c"], "labels": None},
        ],
        [Answers(prompt="p", responses=["a", "b"], labels={"polite": 1}), Answers(prompt="q", responses=["a", "b", "c"])],
        {},
    ),
}  # fmt: skip


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), out)
    return out.getvalue().to_pybytes()  # type: ignore[no-any-return]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(cell) if isinstance(cell, dict | list) else cell for name, cell in row.items()})
    return out.getvalue().encode()


BOM = "\ufeff".encode()
KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": as_jsonl,
    "a.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "gzipped.jsonl": lambda rows: gzip.compress(as_jsonl(rows)),
    "a.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "lines.json": as_jsonl,
    "no-ending": as_jsonl,
    "a.parquet": as_parquet,
    "parquet-without-ending": as_parquet,
    "a.csv": as_csv,
    "A.CSV.gz": lambda rows: gzip.compress(as_csv(rows)),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "bom.jsonl": lambda rows: BOM + as_jsonl(rows),
    "bom.json": lambda rows: BOM + json.dumps(rows).encode(),
    "bom.csv": lambda rows: BOM + as_csv(rows),
    "crlf.jsonl": lambda rows: as_jsonl(rows).replace(b"\n", b"\r\n") + b"\r\n",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_from_every_kind_of_file_and_upload(tmp_path: Path, kind: str, case: str) -> None:
    expected = CASES[case]
    content = KINDS[kind](expected.rows)
    (tmp_path / kind).write_bytes(content)
    dataset = read(tmp_path / kind)
    assert (dataset.format, list(dataset.rows), dict(dataset.left_out)) == (expected.format, expected.read, expected.left_out)
    assert read_upload(content, kind) == dataset


@pytest.mark.parametrize("case", CASES)
def test_rows_at_hand_are_read_as_those_of_a_file(case: str) -> None:
    dataset = read_rows(CASES[case].rows)
    assert (list(dataset.rows), len(dataset.lines)) == (CASES[case].read, len(CASES[case].read))


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (
            {
                "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "p"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "model", "value": "b"},
            },
            Pair(prompt=(Message(role="system", content="s"), Message(role="user", content="p")), chosen="a", rejected="b"),
        ),
        ({"prompt": TRANSCRIPT, "chosen": " a", "rejected": " b"}, Pair(prompt=CONVERSATION, chosen=" a", rejected=" b")),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]}]}
            | {"chosen": "a", "rejected": "b"},
            Pair(prompt="pq", chosen="a", rejected="b"),
        ),
    ],
)
def test_conversations_are_read_as_other_tools_write_them(row: dict[str, Any], pair: Pair) -> None:
    assert list(read_rows([row]).rows) == [pair]


def test_ratings_may_be_plain_numbers() -> None:
    completions = [{"response": "a", "annotations": {"honesty": 1}}, {"response": "b", "ratings": {"honesty": 2.5}}]
    assert list(read_rows([{"prompt": "p", "completions": completions}]).rows) == [example("p", "a", "b", honesty=1)]


def test_a_table_may_have_a_column_for_each_objective() -> None:
    table = b"prompt,response_0,response_1,labels.polite,labels.brief\np,a,b,1,0.0\nq,a,b,,1\n"
    assert list(read_upload(table, "a.csv").rows) == [example("p", "a", "b", polite=1, brief=0), example("q", "a", "b", brief=1)]


def test_lines_are_where_rows_begin_and_where_the_first_of_joined_ones_does() -> None:
    assert read_upload(b'\n{"prompt": "p", "responses": ["a"]}\n\n{"prompt": "q", "responses": ["b"]}').lines == [2, 4]
    assert read_upload(b'prompt,chosen,rejected\np,"a\nb",c\n\nq,a,b\n', "a.csv").lines == [2, 5]
    rows = [{"prompt": "p", "response": text, "helpfulness": score} for text, score in (("a", 1), ("b", 2), ("c", 3))]
    assert read_rows(rows).lines == [1, 1, 2]


@pytest.mark.parametrize("split", ["test", "Validation", "dev", "held_out"])
def test_rows_held_out_by_their_split_are_left_out_unless_asked_for(tmp_path: Path, split: str) -> None:
    # Looked at before answers are paired: the held-out one is no answer to the others' prompt.
    rows = [{"prompt": "p", "response": str(i), "helpfulness": i, "split": split if i == 2 else "train"} for i in range(3)]
    (tmp_path / "a").write_bytes(as_jsonl(rows))
    assert list(read(tmp_path / "a").rows) == [example("p", "0", "1", helpfulness=1)]
    assert read(tmp_path / "a").left_out == {"rows whose `split` holds them out of training": 1}
    assert len(read(tmp_path / "a", held_out=True).rows) == 3
    with pytest.raises(InvalidData, match=r"nothing is left .*: left out were 1 rows whose `split` holds them out"):
        read_rows(rows[2:])


def test_pairs_that_name_their_objectives_become_examples_and_conflict_where_they_meet() -> None:
    helpful = Dataset("pairs", [Pair(prompt="p", chosen="a", rejected="b"), Pair(prompt="q", chosen="a", rejected="b")], [1, 2])
    harmless = Dataset("pairs", [Pair(prompt="p", chosen="b", rejected="a"), Pair(prompt="p", chosen="a", rejected="b")], [1, 2])
    both = joined([helpful.of_objective("helpful"), harmless.of_objective("harmless")])
    assert both.labelled() == [
        example("p", "a", "b", helpful=0, harmless=1),
        example("q", "a", "b", helpful=0),
        example("p", "a", "b", harmless=0),
    ]
    assert both.answers()[0] == Answers(prompt="p", responses=["a", "b"], labels={"helpful": 0})
    assert helpful.answers()[0] == Answers(prompt="p", responses=["a", "b"])


def test_what_names_no_objective_or_another_one_is_refused_with_its_line() -> None:
    pairs = read_rows([{"prompt": "p", "chosen": "a", "rejected": "b", "objective": name} for name in ("helpful", None)])
    answers = read_rows([{"prompt": "p", "responses": ["a", "b"]}])
    labelled = read_rows(CASES["ours"].rows)
    refused: list[tuple[Callable[[], object], str]] = [
        (pairs.labelled, "^line 2: a pair without an objective: .*helpful=FILE, or add a column `objective`"),
        (answers.labelled, "^line 1: answers without labels: give two"),
        (lambda: pairs.of_objective("harmless"), "^line 1: `objective` is 'helpful': the file was given as harmless's"),
        (lambda: labelled.of_objective("helpful"), "^line 1: labelled data names its objectives itself"),
        (lambda: joined([pairs, labelled]), "^pairs and labelled examples cannot be joined"),
    ]
    for refuse, message in refused:
        with pytest.raises(InvalidData, match=message):
            refuse()
    assert labelled.labelled() == CASES["ours"].read
    assert read_rows(CASES["answers"].rows[:1]).labelled() == [example("p", "a", "b", polite=1)]


OURS = CASES["ours"].rows[0]
TWO = {"prompt": "p", "response_0": "a", "response_1": "b"}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**OURS, "prompt": ""}, "`prompt` is '': what the user asks must not be empty"),
        ({**OURS, "prompt": " \n"}, "`prompt` is .*must not be empty"),
        ({**OURS, "prompt": [answer("a")]}, "`prompt` does not end with the user's turn"),
        ({**OURS, "prompt": [{"role": "tool", "content": "a"}]}, r"`prompt\[0\].role` is 'tool': it must be system, user or"),
        ({**OURS, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, r"`prompt\[0\].content\[0\]` is .*only parts"),
        ({**OURS, "prompt": 3}, "`prompt` is 3: it must be text or a list of messages"),
        ({**OURS, "response_0": None}, "`response_0` is missing: it must be text"),
        ({**OURS, "response_0": 3}, "`response_0` is 3: it must be text"),
        ({**OURS, "labels": {}}, "name at least one objective"),
        ({**OURS, "labels": [0, 1]}, "name at least one objective"),
        ({**OURS, "labels": {"polite": 2}}, "the label of 'polite' is 2: it must be 0 .* or 1"),
        ({**OURS, "labels": {"polite": "1"}}, "the label of 'polite' is '1'"),
        ({**OURS, "labels": {"very polite": 1}}, "'very polite' cannot be an objective's name"),
        ({**TWO, "safer_response_id": None}, "neither `better_response_id` nor `safer_response_id` is there"),
        ({"prompt": "p", "response": "a", "coherence": "high"}, "`coherence` is 'high': it must be a number, or absent"),
        ({"prompt": "p", "response": "a", "is_safe": "yes"}, "`is_safe` is 'yes': it must be true or false"),
        ({**TWO, "response_2": "c", "preference_strength": 5}, "`preference_strength` is 5: it must be from -3 to 3"),
        ({"prompt": "p", "completions": [{"annotations": {}}]}, r"`completions\[0\].response` is None: it must be text"),
        ({"prompt": "p", "completions": [rated("a", **{"x y": "1"})]}, "'x y' cannot be an objective's name"),
        ({"chosen": "a", "rejected": "b"}, "a prompt is missing: add a column `prompt`, or make `chosen` a transcript .*Human"),
        ({**PAIR, "chosen": TURNS}, "the last message of `chosen` must be the assistant's answer"),
        ({**PAIR, "rejected": None}, "`rejected` is missing"),
        ({**PAIR, "objective": "soup"}, "'soup' cannot be an objective's name"),
        ({"prompt": "p", "responses": []}, "`responses` is .*one text or more"),
        ({"prompt": "p", "responses": ["a", 1]}, r"`responses\[1\]` is 1: it must be text"),
        ({"prompt": "p", "responses": ["a"], "labels": {"polite": 0}}, "`labels` are given for 1 response:"),
        ({"question": "q", "answers": []}, "the columns 'question', 'answers' .*ours.*PKU-SafeRLHF.*HelpSteer.*rated compl.*pairs"),
        (TWO, "the columns 'prompt', 'response_0', 'response_1' belong to no format"),
        ({**OURS, "x": {"y": "\ud83d"}}, "`x.y` has half a character"),
        ({**OURS, "\ud83d": 1}, r"`'\\ud83d'` has half a character"),
        ({**OURS, "x": [0.0, float("nan")]}, r"`x\[1\]` is nan: a number must be finite"),
        (["prompt"], "a JSON list: each row must be an object"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_line_and_what_would_be_right(row: Any, message: str) -> None:
    with pytest.raises(InvalidData, match=f"^line 1: .*{message}") as caught:
        read_rows([row])
    assert caught.value.line == 1
    caught.value.message.encode()  # whole text, whatever the row held


WHOLE = as_jsonl([OURS])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "the data set is empty"),
        ("a", b"\n \r\n", "the data set is empty"),
        ("a.csv", b"prompt,responses\n", "the data set is empty"),
        ("a", WHOLE + b'{"prompt": "p"', "^line 2: not JSON .*write one object a line, or all of them in an array"),
        ("a", json.dumps(OURS, indent=1).encode(), "^line 1: not JSON .*write one object a line, or all of them in an array"),
        ("a", b'[\n{"prompt": }]', "^line 2: not JSON"),
        ("a", b'["a"]\n["b"]', "^line 2: not JSON .*an array of objects must be all that the file holds"),
        ("a", WHOLE + b'["prompt"]', "^line 2: a JSON list: each row must be an object"),
        ("a", b'[{"prompt": "p", "responses": ["a"]}, 3]', "^line 2: a JSON int"),
        ("a", WHOLE + b'{"prompt": "\xff"}', r"^line 2: not UTF-8 text \(invalid start byte at byte 13\): save it as UTF-8"),
        ("a", WHOLE.decode().encode("utf-16"), r"not UTF-8 text \(UTF-16\): save it as UTF-8"),
        ("a.csv", "prompt".encode("utf-16-le"), "not UTF-8 text"),
        ("a", WHOLE + b'{"x": [{"y": "\\ud83d"}]}', r"^line 2: `x\[0\].y` has half a character"),
        ("a", WHOLE + b'{"x": 1e999}', "^line 2: `x` is inf: a number must be finite"),
        ("a", WHOLE + b'{"x": NaN}', "^line 2: `x` is nan"),
        ("a", WHOLE + b'{"x": ' + b"9" * 5000 + b"}", "^line 2: a number that cannot be read"),
        ("a", WHOLE + b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", "^line 2: nested more than 100 deep"),
        ("a", WHOLE + b'{"x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "^line 2: nested more than 100 deep"),
        ("a.jsonl.gz", gzip.compress(WHOLE, mtime=0)[:-9], "not a whole gzip file"),
        ("a.gz", b"\x1f\x8bno", "not a whole gzip file"),
        ("a", b"PAR1 and no more", "not a readable Parquet file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.csv", b'prompt,responses\np,"[""a""]"\n\nq,"x",3\n', "^line 4: 3 cells, where the first line names 2 columns"),
        ("a.csv", b"prompt,responses\np,a\n", "^line 2: `responses` is 'a': in a table it must be JSON"),
        ("a.csv", b'prompt,responses\np,"a\n', "^line 2: not CSV"),
        ("a.csv", b"prompt,prompt\np,a\n", "^line 1: two columns are called 'prompt'"),
        ("a.csv", b"prompt,response,helpfulness\np,a,nan\n", "^line 2: `helpfulness` is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        read(tmp_path / name)
    with pytest.raises(InvalidData, match=message):
        read_upload(content, name)


def test_byte_order_marks_inside_joined_files_are_passed_over() -> None:
    assert len(read_upload(BOM + WHOLE + BOM + WHOLE).rows) == 2


def test_what_is_no_file_is_told_from_what_may_be_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("nope.jsonl", "a/b/c", "./nope", "/nope", "~/nope", "~nobody-of-that-name/nope", "nope.CSV", "", "a\0b"):
        with pytest.raises((NotFound, InvalidRequest), match=r"there is no file|is a folder: give a file in it"):
            read(source)
    (tmp_path / "mine").write_bytes(WHOLE)
    assert len(read("~/mine").rows) == 1
    with pytest.raises(InvalidRequest, match="is a folder: give a file in it"):
        read(tmp_path)
    with pytest.raises(InvalidRequest, match=r"^cannot read .*: File name too long"):
        read(tmp_path / ("a" * 300))
