"""The decoder over HTTP: what it accepts, what it says was in effect, and policy sets that come and go while it runs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from sipo.policies import PolicySet
from tests.decoder import ServedDecoder

pytestmark = pytest.mark.slow

WEIGHTS = {"concise": 0.7, "warm": 0.3}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def demo(served_decoder: ServedDecoder) -> PolicySet:
    return served_decoder.publish("demo", seed=1)


async def test_a_reply_says_which_set_and_weights_were_in_effect(served_decoder: ServedDecoder, demo: PolicySet) -> None:
    chosen = await served_decoder.complete("Hello", model="demo", preference_weights=WEIGHTS, max_tokens=2)
    default = await served_decoder.complete("Hello", model=demo.id, max_tokens=2)
    named = await served_decoder.complete("Hello", model="demo@concise=0,warm=1", max_tokens=2)
    base = await served_decoder.complete("Hello", model="base", max_tokens=2)

    assert (chosen["policy_set"], chosen["preference_weights"], chosen["model"]) == (demo.id, WEIGHTS, "demo")
    assert (default["policy_set"], default["preference_weights"]) == (demo.id, {"concise": 0.5, "warm": 0.5})
    assert (named["preference_weights"], named["model"]) == ({"concise": 0.0, "warm": 1.0}, "demo@concise=0,warm=1")
    assert (base["policy_set"], base["preference_weights"]) == ("base", {})


async def test_every_chunk_of_a_stream_says_it_too_and_the_text_is_the_same(served_decoder: ServedDecoder, demo: PolicySet) -> None:
    request = {"model": "demo", "preference_weights": WEIGHTS, "messages": MESSAGES, "max_tokens": 8}
    whole = (await served_decoder.post("/v1/chat/completions", **request)).json()
    stream = (await served_decoder.post("/v1/chat/completions", stream=True, **request)).text

    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert all((chunk["policy_set"], chunk["preference_weights"]) == (demo.id, WEIGHTS) for chunk in chunks)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"preference_weights": {"concise": -0.1, "warm": 1.1}}, 400, "preference_weights", "0 or more"),
        ({"preference_weights": {"concise": 0.7, "warm": 0.9}}, 400, "preference_weights", "sum to 1.6"),
        ({"preference_weights": {"concise": 0.7, "kind": 0.3}}, 400, "preference_weights", "unknown objective 'kind'"),
        ({"preference_weights": {"concise": 1}}, 400, "preference_weights", "no weight for 'warm'"),
        ({"preference_weights": {"concise": "1", "warm": 0}}, 400, "preference_weights", "finite number"),
        ({"preference_weights": [1, 0]}, 400, "preference_weights", "dictionary"),
        ({"model": "demo@concise=1"}, 400, "preference_weights", "no weight for 'warm'"),
        ({"model": "demo@concise=1,warm=0", "preference_weights": WEIGHTS}, 400, "preference_weights", "twice"),
        ({"model": "base", "preference_weights": WEIGHTS}, 400, "preference_weights", "no objectives"),
        ({"mode": "best"}, 400, "mode", "unknown mode 'best'"),
        ({"policy_set": "demo:99"}, 404, "policy_set", "known sets"),
        ({"model": "nobody"}, 404, "policy_set", "nobody"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": "word " * 1100}, 400, "input_tokens", "1024"),
        ({"prompt_logprobs": 1}, 400, None, "prompt_logprobs"),
        ({"use_beam_search": True, "n": 2}, 400, None, "mixture"),
        ({"temperature": -1}, 400, "temperature", "non-negative"),
    ],
)
async def test_bad_input_is_refused_in_openais_shape(
    served_decoder: ServedDecoder, demo: PolicySet, fields: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    reply = await served_decoder.post("/v1/completions", **{"model": "demo", "prompt": "Hello", "max_tokens": 2} | fields)

    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert says in error["message"]


async def test_a_callers_own_mixture_or_salt_cannot_replace_ours(served_decoder: ServedDecoder, demo: PolicySet) -> None:
    forged = {"sipo": '{"entries": [{"policy_set": "not loaded", "coefficients": [1], "weight": 1}]}'}

    plain = await served_decoder.complete("Once upon a time", model="demo", mode="warm")
    with_own = await served_decoder.complete("Once upon a time", model="demo", mode="warm", vllm_xargs=forged, cache_salt="mine")

    assert with_own["choices"][0]["text"] == plain["choices"][0]["text"]


async def test_routes_that_would_name_no_mixture_do_not_exist(served_decoder: ServedDecoder) -> None:
    for route in ("/v1/responses", "/v1/messages", "/inference/v1/generate", "/collective_rpc"):
        assert (await served_decoder.post(route)).status_code == 404


async def test_a_published_set_becomes_the_default_while_requests_run_on_the_old_one(served_decoder: ServedDecoder) -> None:
    old = served_decoder.publish("moving", seed=1)
    ask = {"model": "moving", "preference_weights": WEIGHTS, "messages": MESSAGES, "max_tokens": 32, "ignore_eos": True}
    before = (await served_decoder.post("/v1/chat/completions", **ask)).json()["choices"][0]["message"]["content"]

    chunks: list[dict[str, Any]] = []
    async with (
        httpx.AsyncClient(timeout=300) as client,
        client.stream("POST", f"{served_decoder.url}/v1/chat/completions", json={"temperature": 0, "stream": True} | ask) as stream,
    ):
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
            if len(chunks) == 5:
                new = served_decoder.publish("moving", seed=2)
                after = await served_decoder.post("/v1/chat/completions", **ask)

    assert {chunk["policy_set"] for chunk in chunks} == {old.id}
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == before
    assert after.json()["policy_set"] == new.id
    assert after.json()["choices"][0]["message"]["content"] != before
    pinned = await served_decoder.post("/v1/chat/completions", policy_set=old.id, **ask)
    assert pinned.json()["choices"][0]["message"]["content"] == before


async def test_more_sets_than_fit_are_served_in_turn(served_decoder: ServedDecoder) -> None:
    """Two sets stay in memory: with three, some are unloaded and loaded again, which no answer shows."""
    sets = [served_decoder.publish(f"turn{seed}", seed=seed) for seed in (1, 2, 3)]
    first = [await served_decoder.tokens("Once upon a time", model=policy_set.id) for policy_set in sets]
    again = [await served_decoder.tokens("Once upon a time", model=policy_set.id) for policy_set in sets]

    assert first == again
    assert len({tuple(tokens) for tokens in first}) > 1


async def test_a_set_of_another_base_is_refused(served_decoder: ServedDecoder) -> None:
    foreign = served_decoder.publish("foreign", seed=1, base_sha256="f" * 64)

    reply = await served_decoder.post("/v1/completions", model=foreign.id, prompt="Hello")

    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "incompatible_policy")


async def test_the_prefix_cache_is_shared_across_weights_and_changes_no_answer(
    served_decoder: ServedDecoder, demo: PolicySet
) -> None:
    """MOD at two weights, two soups, one policy and the base, on one prompt of several cache blocks. Only the two MOD requests,
    whose keys and values are the same, may share; a salt of the caller's own makes a request start from nothing."""
    prompt = served_decoder.tokenizer("The fox and the crow went to the market. " * 12)["input_ids"]
    requests: list[dict[str, Any]] = [
        {"preference_weights": WEIGHTS},
        {"preference_weights": {"concise": 0.2, "warm": 0.8}},
        {"preference_weights": WEIGHTS, "mode": "soup"},
        {"preference_weights": {"concise": 0.2, "warm": 0.8}, "mode": "soup"},
        {"mode": "warm"},
        {"mode": "base"},
    ]

    async def ask(fields: dict[str, Any]) -> tuple[list[int], int]:
        body = await served_decoder.complete(prompt, model="demo", return_token_ids=True, **fields)
        details = body["usage"]["prompt_tokens_details"] or {}
        return body["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    first = [await ask(fields) for fields in requests]
    second = await asyncio.gather(*(ask(fields) for fields in requests))
    fresh = [await ask(fields | {"cache_salt": f"fresh {i}"}) for i, fields in enumerate(requests)]

    assert [tokens for tokens, _ in first] == [tokens for tokens, _ in second] == [tokens for tokens, _ in fresh]
    assert [cached > 0 for _, cached in first] == [False, True, False, False, False, False]
    assert all(cached > 0 for _, cached in second)
    assert not any(cached for _, cached in fresh)
