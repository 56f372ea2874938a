"""Every command reads every kind of file alike, because there is one reader: the table of kinds and commands."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.cli.demo.input import own_input
from gateway.cli.score.files import ScoredRow
from services.common.settings import CommonSettings
from sipo.preferences import Example
from tests.fakes import write_policy_set
from tests.trainer import stand_in

pytestmark = pytest.mark.slow

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "q0 \u2028 \x85?",
        "response_0": "no, é",
        "response_1": "yes, yes",
        "labels": {"concise": 0, "warm": 1},
        "split": "train",
    },
    {"prompt": "q1?", "response_0": "a longer\nno", "response_1": "yes", "labels": {"concise": 1, "warm": 0}, "split": "train"},
    {"prompt": "q2?", "response_0": "not for training", "response_1": "yes", "labels": {"concise": 1, "warm": 0}, "split": "test"},
]
TRAINED = [Example.model_validate(row) for row in ROWS[:2]]
BOM = b"\xef\xbb\xbf"


def lines(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(rows[0])
    table.writerows([json.dumps(cell) if isinstance(cell, dict) else cell for cell in row.values()] for row in rows)
    return file.getvalue().encode()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": lines,
    "rows.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "rows.parquet": as_parquet,
    "rows.csv": as_csv,
    "rows": lines,
    "marked.jsonl": lambda rows: BOM + lines(rows),
    "marked.json": lambda rows: BOM + json.dumps(rows).encode(),
    "marked.csv": lambda rows: BOM + as_csv(rows),
    "windows.jsonl": lambda rows: BOM + lines(rows, "\r\n"),
}


@pytest.fixture(params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    path.write_bytes(KINDS[path.name](ROWS))
    return path


@pytest.fixture
def sipo(data_dir: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., Result]:
    env = {"SIPO_DATA_DIR": data_dir, "SIPO_CACHE_DIR": tmp_path / "cache", "SIPO_MODEL": tiny_base, "COLUMNS": 200}

    def sipo(*args: object) -> Result:
        result = CliRunner().invoke(app, [*map(str, args)], env={name: str(value) for name, value in env.items()})
        assert result.exit_code == 0, result.output
        return result

    return sipo


def test_conflicts(sipo: Callable[..., Result], file: Path) -> None:
    result = sipo("conflicts", file)
    assert "2 rows, read as sipo" in result.stdout
    assert "conflict ratio: 1.000 (2 of 2 rows with two labels or more)" in result.stdout
    assert f"left out of {file}: rows whose `split` holds them out of training (1)" in result.stderr


def test_train(sipo: Callable[..., Result], file: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(import_module("gateway.cli.train.command"), "run_child", stand_in(adapter, []))
    result = sipo("train", file, "--out", tmp_path / "runs")
    assert f"left out of {file}: rows whose `split` holds them out of training (1)" in result.stderr
    trained = [json.loads(line) for line in (tmp_path / "runs" / "warm" / "pairs.jsonl").read_text().split("\n") if line]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in trained] == [
        (example.prompt, *example.chosen_rejected("warm")) for example in TRAINED
    ]


def test_sft(sipo: Callable[..., Result], file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []

    def train_sft(_run: object, answered: list[Any], out: Path, _report: object, **_: object) -> Path:
        given.extend(answered)
        return out

    monkeypatch.setattr("sipo.training.sft.train_sft", train_sft)
    sipo("sft", file, "--out", tmp_path / "tuned")
    assert [(row.prompt, row.responses) for row in given] == [(row.prompt, [row.response_0, row.response_1]) for row in TRAINED]


def test_score_takes_rows_of_every_split(
    sipo: Callable[..., Result], data_dir: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_policy_set(data_dir / "policies", "mine:1", ["concise", "warm"], current=True)

    def batches(rows: list[Any]) -> Iterator[list[ScoredRow]]:
        scored = {"policy_set": "mine:1", "length_normalized": False}
        yield [
            ScoredRow(
                **scored,
                prompt=row.prompt,
                labels=row.labels,
                rewards=[dict.fromkeys(("concise", "warm"), len(text)) for text in row.responses],
            )
            for row in rows
        ]

    command = import_module("gateway.cli.score.command")
    monkeypatch.setattr(command._Scorer, "open", lambda *_: SimpleNamespace(batches=batches))
    scored = [json.loads(line) for line in sipo("score", file).stdout.split("\n") if line]
    assert [(row["prompt"], [one["warm"] for one in row["rewards"]], row["labels"]) for row in scored] == [
        (row["prompt"], [len(row["response_0"]), len(row["response_1"])], row["labels"]) for row in ROWS
    ]


def test_demo(file: Path, data_dir: Path, tiny_base: Path) -> None:
    source = own_input(CommonSettings(data_dir=data_dir, model=str(tiny_base)), file, None, max_pairs=4)
    assert (source.examples, source.objectives, source.conflicting) == (TRAINED, ["concise", "warm"], 2)


def test_jobs_submit(sipo: Callable[..., Result], file: Path, gateway_url: str, tmp_path: Path) -> None:
    submitted = sipo("jobs", "submit", file, "--policy", "demo", "--url", gateway_url)
    assert stored(tmp_path, submitted.stdout.strip()) == TRAINED
    assert "left out: rows whose `split` holds them out of training (1)" in submitted.stderr


def test_upload(file: Path, gateway_url: str, tmp_path: Path) -> None:
    spec = ("spec.json", b'{"policy": "demo"}')
    with httpx.Client(base_url=gateway_url) as client:
        for name in (file.name, ""):  # as a script may send it: without a name
            if name or "csv" not in file.name:
                reply = client.post("/v1/jobs", files={"spec": spec, "file": (name or "data", file.read_bytes())})
                assert reply.status_code == 201, reply.text
                assert stored(tmp_path, reply.json()["id"]) == TRAINED
                assert reply.json()["notes"] == ["left out: rows whose `split` holds them out of training (1)"]


def test_rows_in_the_body(gateway_url: str, tmp_path: Path) -> None:
    with httpx.Client(base_url=gateway_url) as client:
        reply = client.post("/v1/jobs", json={"spec": {"policy": "demo"}, "examples": ROWS})
        assert reply.status_code == 201, reply.text
        assert stored(tmp_path, reply.json()["id"]) == TRAINED


def stored(data_dir: Path, job: str) -> list[Example]:
    text = (data_dir / "jobs" / job / "input.jsonl").read_text(encoding="utf-8")
    return [Example.model_validate_json(line) for line in text.split("\n") if line]
