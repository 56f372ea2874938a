"""What the decoder cannot answer is refused when the job is posted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gateway.jobs.limits import check_limits, decoder_limits, slots_needed
from services.common.contract.jobs import JobSpec
from services.common.limits import Limits
from services.decoder.settings import DecoderSettings
from sipo.decoding.request import normalized_mixture
from sipo.errors import InvalidRequest
from sipo.preferences import SamplingMode, one_hot_weights, uniform_weights
from tests.fakes import FakeEngine, client_of, served

FIVE = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
NINE = [f"o{i}" for i in range(9)]
LIMITS = Limits(slots=2, max_model_len=1024)


def spec(objectives: list[str] = FIVE, **fields: Any) -> JobSpec:
    return JobSpec(policy="demo", objectives=objectives, **fields)


@pytest.mark.parametrize(
    ("job", "param", "says"),
    [
        (
            spec(),
            "objectives",
            r"a job of 5 objectives .* needs a decoder with SIPO_DECODER_SLOTS=5 \(it is 2\).*mode soup",
        ),
        (spec(NINE), "objectives", "no decoder has more than 8 slots: take mode soup"),
        (spec(["a", "b"], max_tokens=1024), "max_tokens", "room for 1024 tokens with the prompt"),
        (spec(["a", "b"], review_max_tokens=2000), "review_max_tokens", "SIPO_DECODER_MAX_MODEL_LEN"),
    ],
)
def test_a_job_that_the_decoder_cannot_answer_is_refused(job: JobSpec, param: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        check_limits(job, LIMITS)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("job", "limits"),
    [
        (spec(["a", "b"]), LIMITS),
        (spec(mode="soup"), LIMITS),
        (spec(), Limits(slots=5, max_model_len=1024)),
        (spec(["a", "b"], refine=False, review_max_tokens=2000), LIMITS),
    ],
)
def test_a_job_that_fits_is_taken_without_a_word(job: JobSpec, limits: Limits) -> None:
    assert check_limits(job, limits) == []


def test_what_may_not_fit_is_told() -> None:
    assert "does not answer" in check_limits(spec(), None)[0]
    assert "a rewrite may need 1096 tokens" in check_limits(spec(["a", "b"], max_tokens=500), LIMITS)[0]


@pytest.mark.parametrize("mode", ["mod", "soup"])
def test_slots_are_counted_as_the_decoder_counts_them(mode: SamplingMode) -> None:
    for weights in (uniform_weights(FIVE), one_hot_weights("coherence", FIVE)):
        mixture, _ = normalized_mixture("", FIVE, weights, mode)
        assert slots_needed(FIVE, mode) == len(mixture.entries)


async def test_the_decoder_says_what_it_can(data_dir: Path, tiny_base: Path) -> None:
    settings = DecoderSettings(
        data_dir=data_dir, cache_dir=data_dir / "cache", model=str(tiny_base), decoder_slots=3, decoder_max_model_len=100
    )
    async with served(FakeEngine(), settings) as app, client_of(app) as client:
        assert await decoder_limits(client) == Limits(slots=3, max_model_len=100)


async def test_who_is_no_decoder_of_ours_has_no_limits() -> None:
    async with client_of(FastAPI()) as other:
        assert await decoder_limits(other) is None
    async with httpx.AsyncClient(base_url="http://127.0.0.1:1") as nobody:
        assert await decoder_limits(nobody) is None
