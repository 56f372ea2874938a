"""How a job's progress reads where there is no terminal."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from gateway.cli.progress import watch_job
from services.common.contract.job_store import Counts, Job
from services.common.contract.jobs import JobSpec, JobState
from sipo.evaluation.task import EvaluationProgress
from sipo.training.settings import Progress

NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUEUED = Job(id="job-1", spec=JobSpec(policy="demo"), state=JobState.QUEUED, created=NOW, updated=NOW)


def test_each_stage_is_told_once_with_its_numbers_until_the_job_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    step = Progress(objective="warm", stage="training", step=3, of=20, seconds_left=40, loss=0.51)
    reference = Progress(objective="warm", stage="reference", step=80, of=160, seconds_left=60)
    answered = EvaluationProgress(stage="answers of after", done=8, of=32)
    counts = Counts(queued=16, sampled=9, decided=7, accepted=4, none=2, failed=1)
    jobs = [
        QUEUED,
        QUEUED.model_copy(update={"state": JobState.GENERATING, "total": 16, "counts": counts}),
        QUEUED.model_copy(update={"state": JobState.GENERATING, "total": 16, "counts": counts}),
        QUEUED.model_copy(update={"state": JobState.ALIGNING, "progress": reference.model_dump()}),
        QUEUED.model_copy(update={"state": JobState.TRAINING, "progress": step.model_dump()}),
        QUEUED.model_copy(update={"state": JobState.EVALUATING, "progress": answered.model_dump()}),
        QUEUED.model_copy(update={"state": JobState.COMPLETED, "policy_set": "demo:2"}),
    ]
    coming = iter(jobs)
    assert watch_job(lambda: next(coming), every=0) == jobs[-1]
    lines = [line.split(" s  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines] == ["queued", "generating", "aligning", "training", "evaluating", "completed"]
    assert "of 16 prompts 9 have candidates, 7 are decided: 4 accepted, 2 without a better answer, 1 failed" in lines[1]
    assert "warm: reference has scored 80 of 160 pairs, 60 s left" in lines[2]
    assert "warm: step 3 of 20, loss 0.5100, 40 s left" in lines[3]
    assert "evaluating  answers of after: 8 of 32 prompts" in lines[4]


def test_of_several_rounds_each_is_told_by_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    three = QUEUED.model_copy(update={"spec": JobSpec(policy="demo", rounds=3)})
    generating = three.model_copy(update={"state": JobState.GENERATING, "total": 16})
    jobs = [
        three,
        generating,
        generating.model_copy(update={"round": 2}),
        three.model_copy(update={"state": JobState.PUBLISHING, "round": 2}),
        three.model_copy(update={"state": JobState.COMPLETED, "round": 3}),
    ]
    coming = iter(jobs)
    watch_job(lambda: next(coming), every=0)
    lines = [line.split(" s  ", 1)[1].partition(" of 16 prompts")[0] for line in capsys.readouterr().out.splitlines()]
    words = ["queued", "generating  round 1 of 3:", "generating  round 2 of 3:", "publishing  round 2 of 3", "completed"]
    assert lines == words
