"""The scorer on a real queue, with a tiny model and random policies."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from services.common.contract.keys import CANDIDATES, DECISIONS, dead
from services.common.contract.messages import Candidate, PromptDecided, PromptQueued, PromptSampled
from services.common.queue import Queue, connect
from services.scorer.app import create_app
from services.scorer.scoring import Given
from services.scorer.settings import ScorerSettings
from sipo.evaluation.ground_truth import concise, warm
from sipo.lora import ADAPTABLE_MODULES
from sipo.models import model_sha256
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Example, format_weights, sampling_weights
from sipo.prompts import PromptFormat
from sipo.selection import Filter
from support import PATIENCE
from tests.plans import sampling_plan
from tests.policies import publish_random, rewards_one_by_one

OBJECTIVES = ["concise", "warm"]
SOUPS = sampling_weights(OBJECTIVES)
NAMES = [*OBJECTIVES, *map(format_weights, SOUPS)]
END = 0

Start = Callable[[], Any]


@pytest.fixture
def settings(data_dir: Path, tmp_path: Path, tiny_base: Path) -> ScorerSettings:
    return ScorerSettings(data_dir=data_dir, cache_dir=tmp_path / "cache", model=str(tiny_base), scorer_threads=1)


@pytest.fixture
def policies(settings: ScorerSettings, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PolicySet:
    """demo:1; its two policies are nearly independent."""
    return publish(settings, tiny_base, tiny_tokenizer, tmp_path, seed=1)


def publish(
    settings: ScorerSettings, base: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, *, seed: int, scale: float = 0.1
) -> PolicySet:
    store = PolicyStore(settings.data_dir / "policies")
    targets = dict.fromkeys(OBJECTIVES, ADAPTABLE_MODULES)
    sha256 = model_sha256(base, settings.cache_dir)
    return publish_random(
        store, base, folder, targets, base_sha256=sha256, prompt_format=PromptFormat.of(tokenizer), seed=seed, scale=scale
    )


@pytest.fixture
def start(settings: ScorerSettings, redis: Redis, redis_url: str) -> Start:
    """Runs a scorer for the time of the body."""

    @asynccontextmanager
    async def start() -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(settings, connect(redis_url))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://scorer") as client,
        ):
            yield client

    return start


def candidate(text: str, tokenizer: PreTrainedTokenizerFast, *, ended: bool = True) -> Candidate:
    ids = tokenizer(text)["input_ids"]
    reason = "stop" if ended else "length"
    return Candidate(
        text=text, token_ids=[*ids, END] if ended else ids, finish_reason=reason, weights=SOUPS[0], stage="sample", review=None
    )


def sampled(
    prompt: int, candidates: list[Candidate], *, reward_set: str = "demo:1", response_0: str = "no", by: Filter | None = None
) -> PromptSampled:
    example = Example(prompt=f"What is {prompt}?", response_0=response_0, response_1="yes, yes", labels={"concise": 0, "warm": 1})
    plan = sampling_plan(
        OBJECTIVES, reward_set=reward_set, weights=[*SOUPS, {"concise": 1.0, "warm": 0.0}], refine=False, filter=by or Filter()
    )
    return PromptSampled(
        queued=PromptQueued(job="job-1", round=1, prompt=str(prompt), example=example, plan=plan), candidates=candidates
    )


def random_texts(count: int) -> list[str]:
    drawn = random.Random(0)
    return ["".join(drawn.choice("abcdefg ,.") for _ in range(drawn.randint(2, 20))).strip() + "!" for _ in range(count)]


async def decisions(redis: Redis, count: int, seconds: float = PATIENCE) -> list[PromptDecided]:
    """The first `count` decisions, in the order in which they came."""
    async with asyncio.timeout(seconds):
        while await redis.xlen(DECISIONS) < count:  # noqa: ASYNC110, another process adds them
            await asyncio.sleep(0.05)
    return [PromptDecided.model_validate_json(fields["data"]) for _, fields in await redis.xrange(DECISIONS)]


async def by_prompt(redis: Redis, count: int) -> dict[str, PromptDecided]:
    found = await decisions(redis, count)
    assert len({one.id for one in found}) == len(found) == count
    return {one.prompt: one for one in found}


@pytest.mark.slow
async def test_each_prompt_gets_one_decision_that_follows_eq_7_on_independently_computed_rewards(
    start: Start, redis: Redis, policies: PolicySet, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [sampled(prompt, [candidate(text, tiny_tokenizer) for text in random_texts(12)]) for prompt in range(3)]
    messages.append(sampled(3, [candidate("no", tiny_tokenizer)]))
    for message in messages:
        await Queue(redis).put(CANDIDATES, message)
    async with start():
        found = await by_prompt(redis, 4)
    assert await redis.xlen(CANDIDATES) == 0

    prompt_format = policies.manifest.prompt_format
    for message in messages[:3]:
        example, decision = message.queued.example, found[message.prompt]
        originals = [prompt_format.response_ids(text, tiny_tokenizer) for text in (example.response_0, example.response_1)]
        answers = [*originals, *(one.token_ids for one in message.candidates)]
        prompt = prompt_format.prompt_ids(example.prompt, tiny_tokenizer)
        first, second, *others = rewards_one_by_one(tiny_base, policies, prompt, answers, SOUPS)
        assert decision.rewards_0 == pytest.approx(first, abs=1e-3)
        assert decision.rewards_1 == pytest.approx(second, abs=1e-3)
        for one, wanted in zip(decision.candidates, others, strict=True):
            assert list(one.rewards or {}) == NAMES  # the vertex of W is no soup
            assert one.rewards == pytest.approx(wanted, abs=1e-3)
        better = [i for i, one in enumerate(others) if all(one[name] > max(first[name], second[name]) for name in NAMES)]
        best = max(better, key=lambda i: sum(others[i].values()), default=None)
        assert decision.outcome == ("none" if best is None else "accepted")
        assert [one.candidate for one in decision.chosen] == ([] if best is None else [best])
        assert [i for i, one in enumerate(decision.candidates) if one.rejected is None] == ([] if best is None else [best])
    assert "accepted" in {one.outcome for one in found.values()}
    assert found["3"].outcome == "none"
    assert found["3"].rewards_0 is None


async def test_truncated_empty_and_duplicate_candidates_are_rejected_unscored(
    start: Start, redis: Redis, policies: PolicySet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    made = [
        candidate("cut of", tiny_tokenizer, ended=False),
        candidate("", tiny_tokenizer),
        candidate("no", tiny_tokenizer),
        candidate("new", tiny_tokenizer),
        candidate("new", tiny_tokenizer),
    ]
    await Queue(redis).put(CANDIDATES, sampled(0, made))
    async with start():
        [decision] = await decisions(redis, 1)
    reasons = [one.rejected for one in decision.candidates]
    assert [reasons[index] for index in (0, 1, 2, 4)] == [
        "truncated",
        "empty",
        "duplicate: of response_0",
        "duplicate: of candidate 3",
    ]
    assert [one.rewards is None for one in decision.candidates] == [True, True, True, False, True]


async def test_a_message_is_scored_by_the_set_it_names(
    start: Start,
    redis: Redis,
    settings: ScorerSettings,
    policies: PolicySet,
    tiny_base: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Also by one that was published while the scorer runs, and whichever is current."""
    made = [candidate("new", tiny_tokenizer)]
    prompt = policies.manifest.prompt_format.prompt_ids("What is 0?", tiny_tokenizer)
    async with start():
        second = publish(settings, tiny_base, tiny_tokenizer, tmp_path, seed=2)
        rewards = []
        for count, policy_set in enumerate((second, policies), start=1):
            await Queue(redis).put(CANDIDATES, sampled(0, made, reward_set=policy_set.id))
            rewards.append((await decisions(redis, count))[-1].candidates[0].rewards)
    for policy_set, found in zip((second, policies), rewards, strict=True):
        [wanted] = rewards_one_by_one(tiny_base, policy_set, prompt, [made[0].token_ids], SOUPS)
        assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
async def test_a_message_that_cannot_be_scored_is_decided_as_failed_and_its_neighbours_as_usual(
    start: Start, redis: Redis, policies: PolicySet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    good = candidate("new", tiny_tokenizer)
    long = sampled(2, [good], response_0="much too long " * 20)
    for message in (sampled(0, [good], reward_set="demo:7"), sampled(1, [good]), long):
        await Queue(redis).put(CANDIDATES, message)
    async with start():
        found = await by_prompt(redis, 3)
    assert [found[prompt].outcome == "failed" for prompt in ("0", "1", "2")] == [True, False, True]
    assert "no policy set 'demo:7': known sets are demo:1" in (found["0"].error or "")
    assert "too long: 297 tokens, at most 256" in (found["2"].error or "")
    assert [one.rejected for one in found["2"].candidates] == ["not_scored"]
    assert await redis.xlen(dead(CANDIDATES)) == 2
    assert await redis.xlen(CANDIDATES) == 0


async def test_a_jobs_filter_says_what_is_scored_and_what_is_chosen(
    start: Start, redis: Redis, policies: PolicySet, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    made = [candidate(text, tiny_tokenizer) for text in random_texts(12)]
    made = [one.model_copy(update={"stage": ("sample", "rewrite")[index % 2]}) for index, one in enumerate(made)]
    filters = [
        Filter(soups=False),
        Filter(length_normalized=True),
        Filter(rule="separate_responses", top_k=2),
        Filter(keep_rewrite=True),
        Filter(rule="no_filter", soups=False),
    ]
    for prompt, by in enumerate(filters):
        message = sampled(prompt, made, by=by)
        # The same text for all, so that one reference will do.
        example = message.queued.example.model_copy(update={"prompt": "What is 0?"})
        message = message.model_copy(update={"queued": message.queued.model_copy(update={"example": example})})
        await Queue(redis).put(CANDIDATES, message)
    async with start():
        found = await by_prompt(redis, len(filters))

    prompt_format = policies.manifest.prompt_format
    originals = [prompt_format.response_ids(text, tiny_tokenizer) for text in ("no", "yes, yes")]
    answers = [*originals, *(one.token_ids for one in made)]
    wanted = rewards_one_by_one(tiny_base, policies, prompt_format.prompt_ids("What is 0?", tiny_tokenizer), answers, SOUPS)

    def rewards(decision: PromptDecided) -> list[dict[str, float]]:
        return [one.rewards or {} for one in decision.candidates]

    policies_only = [{name: one[name] for name in OBJECTIVES} for one in wanted]
    per_token = [{name: value / len(ids) for name, value in one.items()} for one, ids in zip(wanted, answers, strict=True)]
    for prompt, expected in enumerate([policies_only, per_token, wanted, wanted, policies_only]):
        for one, other in zip(rewards(found[str(prompt)]), expected[2:], strict=True):
            assert one == pytest.approx(other, abs=1e-3)

    separate = found["2"].chosen
    for objective, original in (("concise", 0), ("warm", 1)):
        better = [j for j, one in enumerate(wanted[2:]) if one[objective] > wanted[original][objective]]
        best = sorted(better, key=lambda j: -wanted[2 + j][objective])[:2]
        assert [one.candidate for one in separate if one.objective == objective] == best != []
    for index in range(0, 12, 2):
        sample, rewrite = (found["3"].candidates[j].rejected or "" for j in (index, index + 1))
        improved = any(wanted[3 + index][name] > wanted[2 + index][name] for name in OBJECTIVES)
        assert sample.startswith("rewritten") == improved
        assert rewrite.startswith("not_improved") != improved
    assert len(found["0"].chosen) == len(found["4"].chosen) == 1
    assert [one.rejected for one in found["4"].candidates].count("not_drawn: 1 of 12 were drawn") == 11


@pytest.mark.slow
async def test_external_reward_models_decide_beside_the_policies_or_alone(
    settings: ScorerSettings, redis: Redis, redis_url: str, policies: PolicySet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """By the entry points that come with the package."""
    settings = settings.model_copy(update={"reward_models": {"brief": "python:concise", "kind": "python:warm"}})
    best = "You are so kind, and your question about 0 is lovely: thank you!"
    made = [candidate(text, tiny_tokenizer) for text in ("What a number", best)]
    for prompt, by in enumerate(
        [
            Filter(implicit=False, reward_models=["brief", "kind"]),
            Filter(reward_models=["kind"], soups=False),
            Filter(reward_models=["unknown"]),
        ]
    ):
        await Queue(redis).put(CANDIDATES, sampled(prompt, made, by=by))
    async with create_app(settings, connect(redis_url)).router.lifespan_context(FastAPI()):
        found = await by_prompt(redis, 3)
    alone = found["0"].candidates[1].rewards
    prompt = found["0"].example.prompt
    assert alone == {"brief": concise(prompt, best), "kind": warm(prompt, best)}
    assert [one.candidate for one in found["0"].chosen] == [1]
    assert list(found["1"].candidates[0].rewards or {}) == [*OBJECTIVES, "kind"]
    assert (found["2"].outcome, "no reward model 'unknown'" in (found["2"].error or "")) == ("failed", True)


async def test_candidates_that_cannot_be_scored_are_rejected_and_the_others_decided(
    start: Start, redis: Redis, policies: PolicySet, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    good = candidate("new", tiny_tokenizer)
    elsewhere, filtered, silent, cut = (
        Candidate(text=text, token_ids=[], finish_reason=reason, weights=None, stage="distilled", teacher="big")
        for text, reason in (("from elsewhere", "stop"), ("", "content_filter"), ("", "stop"), ("from els", "length"))
    )
    made = [candidate("much too long " * 20, tiny_tokenizer), good, elsewhere, filtered, silent, cut]
    await Queue(redis).put(CANDIDATES, sampled(0, made, by=Filter(keep_truncated=True)))
    async with start():
        [decision] = await decisions(redis, 1)
    assert decision.candidates[0].rejected == "too_long: 297 tokens with its prompt, at most 256"
    assert [one.rewards is None for one in decision.candidates] == [True, False, False, True, True, True]
    assert [one.rejected for one in decision.candidates[3:]] == [
        "empty",
        "empty",
        "truncated: made elsewhere, so its tokens are not known to the last",
    ]
    prompt = policies.manifest.prompt_format.prompt_ids("What is 0?", tiny_tokenizer)
    ids = [*tiny_tokenizer("from elsewhere")["input_ids"], END]
    [wanted] = rewards_one_by_one(tiny_base, policies, prompt, [ids], SOUPS)
    assert decision.candidates[2].rewards == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
async def test_rewards_that_are_not_finite_are_never_ranked_and_never_answered(
    start: Start, redis: Redis, settings: ScorerSettings, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """An adapter that overflows: its values are finite, what it computes is not."""
    publish(settings, tiny_base, tiny_tokenizer, tmp_path, seed=3, scale=1e30)
    await Queue(redis).put(CANDIDATES, sampled(0, [candidate("new", tiny_tokenizer)]))
    async with start() as client:
        [decision] = await decisions(redis, 1)
        body = {"policy_set": "demo", "prompt": "x", "responses": [{"text": "yes"}, {"text": "no"}]}
        plain = await client.post("/v1/rewards", json=body)
        lines = (await client.post("/v1/rewards", json=body | {"stream": True})).text.splitlines()
    assert (decision.outcome, "no candidate can be compared" in (decision.error or "")) == ("failed", True)
    assert (plain.status_code, "not finite" in plain.json()["error"]["message"]) == (500, True)
    assert [*json.loads(lines[-1])] == ["error"] and len(lines) == 2


@pytest.mark.slow
async def test_several_scorers_decide_each_prompt_once(
    start: Start, redis: Redis, policies: PolicySet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for prompt in range(24):
        await Queue(redis).put(CANDIDATES, sampled(prompt, [candidate(text, tiny_tokenizer) for text in random_texts(3)]))
    async with start(), start(), start():
        found = await by_prompt(redis, 24)
    assert sorted(map(int, found)) == list(range(24))
    assert await redis.xlen(CANDIDATES) == await redis.xlen(dead(CANDIDATES)) == 0


@pytest.mark.slow
async def test_ten_thousand_responses_are_streamed_while_others_are_served(
    start: Start, redis: Redis, policies: PolicySet, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [f"answer {index}" for index in range(10_000)]
    body = {"policy_set": "demo", "prompt": "x", "responses": [{"text": text} for text in texts], "stream": True}
    async with start() as client:
        streamed = asyncio.create_task(client.post("/v1/rewards", json=body))
        await Queue(redis).put(CANDIDATES, sampled(0, [candidate("new", tiny_tokenizer)]))
        await decisions(redis, 1)
        short = await client.post("/v1/rewards", json=body | {"responses": [{"text": texts[7]}], "stream": False})
        assert not streamed.done()
        header, *lines = [json.loads(line) for line in (await streamed).text.splitlines()]
    assert header == {"policy_set": "demo:1", "names": OBJECTIVES}
    assert [line["index"] for line in lines] == list(range(10_000))
    assert lines[7]["rewards"] == pytest.approx(short.json()["rewards"][0], abs=1e-3)
    prompt = policies.manifest.prompt_format.prompt_ids("x", tiny_tokenizer)
    some = [0, 4321, 9999]
    answers = [[*tiny_tokenizer(texts[index])["input_ids"], END] for index in some]
    for index, wanted in zip(some, rewards_one_by_one(tiny_base, policies, prompt, answers, []), strict=True):
        assert lines[index]["rewards"] == pytest.approx(wanted, abs=1e-3)


def test_a_candidate_is_scored_on_the_tokens_it_was_made_of(bundled_base: Path) -> None:
    """A decoder may write a text in other tokens than the tokenizer would."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_base)
    chat, end = PromptFormat.of(tokenizer), tokenizer.eos_token_id
    made = [*tokenizer("un")["input_ids"], *tokenizer("believ")["input_ids"], *tokenizer("able")["input_ids"]]
    assert Given(text=tokenizer.decode(made)).ids(chat, tokenizer) != [*made, end]
    assert Given(token_ids=made).ids(chat, tokenizer) == Given(token_ids=[*made, end]).ids(chat, tokenizer) == [*made, end]
    assert Given(token_ids=made, ended=False).ids(chat, tokenizer) == made


async def test_rewards_over_http_are_those_of_text_or_of_its_token_ids(
    start: Start, policies: PolicySet, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tiny_tokenizer("yes")["input_ids"]
    responses = [
        {"text": "yes"},
        {"token_ids": [*ids, END]},
        {"token_ids": ids},
        {"token_ids": ids, "finish_reason": "length"},
        {"text": "yes", "finish_reason": "length"},
    ]
    async with start() as client:
        assert (await client.get("/ready")).status_code == 200
        body = {"policy_set": "demo", "prompt": "x", "responses": responses, "weights": SOUPS}
        reply = (await client.post("/v1/rewards", json=body)).json()
    assert (reply["policy_set"], reply["names"]) == ("demo:1", NAMES)
    prompt = policies.manifest.prompt_format.prompt_ids("x", tiny_tokenizer)
    ended, cut = rewards_one_by_one(tiny_base, policies, prompt, [[*ids, END], ids], SOUPS)
    for found, wanted in zip(reply["rewards"], [ended, ended, ended, cut, cut], strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)
    assert ended != pytest.approx(cut, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"policy_set": "demo:9"}, 404, "policy_set"),
        ({"weights": [{"concise": 0.5}]}, 400, "weights"),
        ({"weights": [{"concise": 0.5, "warm": 0.9}]}, 400, "weights"),
        ({"responses": []}, 400, "responses"),
        ({"responses": [{"text": "a", "token_ids": [1]}]}, 400, "responses.0"),
        ({"responses": [{"token_ids": [999_999]}]}, 400, "responses"),
        ({"responses": [{"text": "a"}] * 16_385}, 400, "responses"),
        ({"weights": [{"concise": 0.5, "safe": 0.5}]}, 400, "weights"),
        ({"responses": [{"text": "too long " * 99}]}, 400, "responses"),
        ({"prompt": ""}, 400, "prompt"),
    ],
)
async def test_wrong_requests_are_refused_with_the_field_at_fault(
    start: Start, policies: PolicySet, change: dict[str, Any], status: int, param: str
) -> None:
    body = {"policy_set": "demo:1", "prompt": "x", "responses": [{"text": "a"}]} | change
    async with start() as client:
        reply = await client.post("/v1/rewards", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
