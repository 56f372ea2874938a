"""The reviewer's HTTP, through the client that the worker uses, over a fake decoder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from services.common.web.clients import DecoderClient, ReviewerClient
from services.reviewer.app import create_app
from services.reviewer.settings import ReviewerSettings
from sipo.errors import InvalidRequest, NotFound, Unavailable
from sipo.prompts import PromptFormat
from sipo.refinement import TemplateBook
from tests.fakes import FakeDecoder, write_policy_set

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OBJECTIVES = ["concise", "warm"]
ASKED: dict[str, Any] = {
    "objectives": OBJECTIVES,
    "weights": {"concise": 0.2, "warm": 0.8},
    "policy_set": "demo:1",
    "max_tokens": 16,
    "temperature": 0.5,
    "seed": 7,
}


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def settings(data_dir: Path, tiny_base: Path) -> ReviewerSettings:
    write_policy_set(data_dir / "policies", "demo:1", OBJECTIVES, current=True)
    raw = PromptFormat(kind="raw", template="Q: {prompt}\nA:")
    write_policy_set(data_dir / "policies", "plain:1", OBJECTIVES, prompt_format=raw)
    return ReviewerSettings(data_dir=data_dir, model=str(tiny_base))


@pytest.fixture
async def http(settings: ReviewerSettings, decoder: FakeDecoder) -> AsyncIterator[httpx.ASGITransport]:
    async with DecoderClient("http://decoder", transport=httpx.ASGITransport(decoder.app)) as client:
        yield httpx.ASGITransport(create_app(settings, client))


@pytest.fixture
async def reviewer(http: httpx.ASGITransport) -> AsyncIterator[ReviewerClient]:
    async with ReviewerClient("http://reviewer", transport=http) as client:
        yield client


async def test_a_review_is_asked_of_the_decoder_as_a_chat_under_the_callers_weights(
    reviewer: ReviewerClient, decoder: FakeDecoder
) -> None:
    decoder.answer = " Say less. "
    assert await reviewer.review("How?", "So.", **ASKED) == "Say less."
    [body] = decoder.bodies
    assert body["preference_weights"] == ASKED["weights"]
    assert [body[name] for name in ("policy_set", "max_tokens", "temperature", "seed")] == ["demo:1", 16, 0.5, 7]
    assert "How?" in body["messages"][-1]["content"]
    assert "stop" not in body


async def test_an_unchanged_rewrite_keeps_the_decoders_tokens(reviewer: ReviewerClient, decoder: FakeDecoder) -> None:
    decoder.answer = "Eight minutes!"
    rewrite = await reviewer.rewrite("How?", "So.", "Say less.", **ASKED)
    assert (rewrite.text, rewrite.finish_reason) == ("Eight minutes!", "stop")
    assert rewrite.token_ids == decoder.token_ids("Eight minutes!")
    assert all(part in decoder.bodies[0]["messages"][-1]["content"] for part in ("How?", "So.", "Say less."))


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
async def test_a_rewrite_that_was_cut_has_the_tokens_of_its_own_text_and_ends(
    reviewer: ReviewerClient, decoder: FakeDecoder, tiny_tokenizer: PreTrainedTokenizerFast, finish_reason: str
) -> None:
    decoder.finish_reason = finish_reason
    decoder.answer = f"Eight minutes!\n\n{TemplateBook().find(OBJECTIVES).rewrite.marker} another one"
    rewrite = await reviewer.rewrite("How?", "So.", "Say less.", **ASKED)
    assert (rewrite.text, rewrite.finish_reason) == ("Eight minutes!", "stop")
    assert rewrite.token_ids == PromptFormat().response_ids("Eight minutes!", tiny_tokenizer)


async def test_a_rewrite_out_of_room_has_no_end_token(
    reviewer: ReviewerClient, decoder: FakeDecoder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder.finish_reason, decoder.answer = "length", "Eight min "
    rewrite = await reviewer.rewrite("How?", "So.", "Say less.", **ASKED)
    assert (rewrite.text, rewrite.finish_reason) == ("Eight min", "length")
    assert rewrite.token_ids == PromptFormat().response_ids("Eight min", tiny_tokenizer, ended=False)


async def test_nothing_left_is_an_empty_text(reviewer: ReviewerClient, decoder: FakeDecoder) -> None:
    decoder.answer = " \n"
    assert await reviewer.review("How?", "So.", **ASKED) == ""
    assert (await reviewer.rewrite("How?", "So.", "", **ASKED)).text == ""


async def test_a_raw_policy_set_is_asked_with_one_text_that_stops_at_a_new_example(
    reviewer: ReviewerClient, decoder: FakeDecoder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder.answer = "Eight minutes!"
    decoder.end_token = None  # as at a stop string
    rewrite = await reviewer.rewrite("How?", "So.", "Say less.", **ASKED | {"policy_set": "plain:1"})
    [body] = decoder.bodies
    assert body["prompt"].count("How?") == 1
    examples = TemplateBook().find(OBJECTIVES).examples
    assert body["prompt"].count(body["stop"][0]) == len(examples) + 1
    assert rewrite.token_ids == PromptFormat().response_ids("Eight minutes!", tiny_tokenizer)


async def test_unknown_objectives_get_the_general_prompt(reviewer: ReviewerClient, decoder: FakeDecoder) -> None:
    await reviewer.review("How?", "So.", **ASKED | {"objectives": ["brave", "bright_eyed"]})
    assert "brave and bright eyed" in decoder.bodies[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": {"concise": 0.2, "warm": 0.2}}, "must sum to 1"),
        ({"weights": {"concise": 1.0}}, "no weight for 'warm'"),
        ({"objectives": ["concise"]}, "objectives"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_bad_input_is_refused_before_the_decoder_is_asked(
    reviewer: ReviewerClient, decoder: FakeDecoder, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        await reviewer.review("How?", "So.", **ASKED | changes)
    with pytest.raises(InvalidRequest, match="prompt"):
        await reviewer.review("", "So.", **ASKED)
    with pytest.raises(NotFound, match="demo:9"):
        await reviewer.review("How?", "So.", **ASKED | {"policy_set": "demo:9"})
    assert decoder.bodies == []


async def test_it_is_as_ready_and_as_available_as_its_decoder(reviewer: ReviewerClient, decoder: FakeDecoder) -> None:
    assert await reviewer.ready() is None
    decoder.error = (503, {"error": {"message": "loading the model"}})
    assert "loading the model" in (await reviewer.ready() or "")
    with pytest.raises(Unavailable, match="loading the model"):
        await reviewer.review("How?", "So.", **ASKED)
    decoder.error = (400, {"error": {"message": "too long"}})
    with pytest.raises(InvalidRequest, match="too long"):
        await reviewer.review("How?", "So.", **ASKED)


def test_it_has_a_decoder_of_its_own_if_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIPO_DECODER_URL", "http://shared")
    assert ReviewerSettings().decoder_url == "http://shared"
    monkeypatch.setenv("SIPO_REVIEWER_DECODER_URL", "http://own")
    assert ReviewerSettings().decoder_url == "http://own"
    assert ReviewerSettings(decoder_url="http://given").decoder_url == "http://given"
