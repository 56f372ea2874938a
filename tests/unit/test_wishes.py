from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.evaluation.report import AtWeight, EvaluationReport, Interval, MethodResult

POINTS = [(0.0, 0.1, 0.6), (0.4, 0.2, 0.5), (0.6, 0.3, 0.32), (1.0, 0.5, 0.1)]
"""Weight of concise, and the means of concise and warm at it."""


def point(weight: float | None, concise: float, warm: float) -> AtWeight:
    def sure(value: float) -> Interval:
        return Interval(value=value, low=value, high=value)

    return AtWeight(
        weights=None if weight is None else {"concise": weight, "warm": 1 - weight},
        rewards={"concise": sure(concise), "warm": sure(warm)},
        tokens=sure(20),
        truncated=0,
        empty=0,
        distinct=1,
    )


def method(name: str, *points: AtWeight, hypervolume: float = 0.1) -> MethodResult:
    volume = Interval(value=hypervolume, low=hypervolume, high=hypervolume)
    return MethodResult(
        name=name,
        kind="base" if name == "base" else "mod",
        source=name,
        points=list(points),
        front=[],
        hypervolume=volume,
        igd_plus=volume,
        inner_product=None,
        spread={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    report = EvaluationReport(
        name="x",
        made=datetime(2026, 1, 1, tzinfo=UTC),
        base="b",
        prompts=3,
        prompts_sha256="0",
        objectives=["concise", "warm"],
        judges={},
        reference_point={},
        max_tokens=9,
        methods=[
            method("base", point(None, 0.1, 0.1)),
            method("poor", point(0.5, 0.9, 0.9), hypervolume=0.01),
            method("good", *(point(*one) for one in POINTS)),
        ],
        comparisons=[],
        samples=[],
        seconds={},
        tokens={},
    )
    (tmp_path / "report.json").write_text(report.model_dump_json())
    return tmp_path


def asked(folder: Path, *args: str) -> Result:
    return CliRunner().invoke(app, ["weights", str(folder), *args])


def test_proposals_of_the_best_method(folder: Path) -> None:
    lines = [line.split() for line in asked(folder).stdout.splitlines()]
    assert lines[0] == ["good", "weights", "concise", "warm"]
    # Gains in parts of the greatest: 0.25 and 0.8 at 0.4, 0.5 and 0.44 at 0.6.
    assert lines[1] == ["most", "even", "gain", "concise=0.6,warm=0.4", "0.300", "(-0.200)", "0.320", "(-0.280)"]
    assert lines[2][:4] == ["best", "worst", "case", "concise=0.6,warm=0.4"]


@pytest.mark.parametrize(
    ("args", "weights"),
    [
        (["--at-least", "warm=0.5"], "concise=0.4,warm=0.6"),
        (["--at-least", "warm=0.51"], "concise=0,warm=1"),
        (["--at-least", "concise=0.3"], "concise=0.6,warm=0.4"),
        (["--at-least", "concise=0.1,warm=0.1", "--most", "concise"], "concise=1,warm=0"),
        (["--method", "poor", "--at-least", "warm=0.5"], "concise=0.5,warm=0.5"),
    ],
)
def test_as_much_as_a_wish_for_the_others_allows(folder: Path, args: list[str], weights: str) -> None:
    result = asked(folder, *args)
    assert result.exit_code == 0, result.output
    assert weights in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--at-least", "warm=0.7"], "no measured weight of good has warm 0.7 or more: its best are warm 0.600"),
        (["--at-least", "loud=0.7"], "say with --most"),
        (["--at-least", "loud=0.7", "--most", "warm"], "unknown objective 'loud': the report has concise, warm"),
        (["--method", "base"], "no method 'base' that takes weights: it has poor, good"),
        (["--most", "warm"], "--most goes with --at-least"),
    ],
)
def test_a_wish_that_nothing_fits_is_refused(folder: Path, args: list[str], words: str) -> None:
    result = asked(folder, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_what_is_no_report_is_told(tmp_path: Path) -> None:
    assert "there is no report" in asked(tmp_path).stderr
    (tmp_path / "report.json").write_text("{}")
    assert "is no report of `sipo evaluate`" in asked(tmp_path).stderr
