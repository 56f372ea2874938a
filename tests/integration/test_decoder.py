"""The decoder over HTTP: what it accepts, what it says was in effect, and policy sets that come and go while it runs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from services.common.background import end_tasks
from sipo.policies import Draft, PolicySet
from sipo.prompts import PromptFormat
from support.decoder import ServedDecoder

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
        ({"model": "demo@concise=1"}, 400, "model", "no weight for 'warm'"),
        ({"model": "demo@concise=1,warm=0", "preference_weights": WEIGHTS}, 400, "preference_weights", "once"),
        ({"model": "base", "preference_weights": WEIGHTS}, 400, "preference_weights", "no objectives"),
        ({"mode": "best"}, 400, "mode", "unknown mode 'best'"),
        ({"policy_set": "demo:99"}, 404, "policy_set", "known sets"),
        ({"model": "nobody"}, 404, "model", "nobody"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": ["Hello", ""]}, 400, "prompt", "empty"),
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


async def test_policies_with_a_chat_template_of_their_own_are_asked_in_it(served_decoder: ServedDecoder, demo: PolicySet) -> None:
    """The tokens that vLLM makes of a conversation are those of scoring and training. A caller's template is refused."""
    template = (
        "{% for m in messages %}[{{ m.role | upper }}]\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[A]\n{% endif %}"
    )
    own = PromptFormat.of(served_decoder.tokenizer, system="Be brief.", chat_template=template)
    draft = Draft(name="own", base=demo.manifest.base, prompt_format=own, objectives=demo.objectives, beta=0.1)
    served_decoder.store.publish(draft, served_decoder.adapters(seed=1), served_decoder.base, activate=True)
    ask = {"messages": own.messages("Where is Paris?"), "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}

    for name, prompt_format in (("own", own), ("demo", demo.manifest.prompt_format)):
        reply = (await served_decoder.post("/v1/chat/completions", model=name, **ask)).json()
        expected = prompt_format.model_copy(update={"system": "Be brief."}).prompt_ids("Where is Paris?", served_decoder.tokenizer)
        assert reply["prompt_token_ids"] == expected
        assert reply["choices"][0]["token_ids"] == await served_decoder.tokens(expected, model=name, max_tokens=4)
    refused = await served_decoder.post("/v1/chat/completions", model="own", chat_template="x", **ask)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")


async def test_routes_that_would_name_no_mixture_do_not_exist(served_decoder: ServedDecoder) -> None:
    for route in ("/v1/responses", "/v1/messages", "/inference/v1/generate", "/collective_rpc"):
        assert (await served_decoder.post(route)).status_code == 404


async def test_policies_change_under_load(served_decoder: ServedDecoder) -> None:
    """Three callers ask on and on for the current set of a name, which changes twice: every answer is wholly of the set named."""
    old = served_decoder.publish("moving", seed=1)
    ask = {"model": "moving", "preference_weights": WEIGHTS, "prompt": "Once upon a time", "max_tokens": 8}
    answers: list[tuple[str, str]] = []

    async def caller() -> None:
        while len({policy_set for policy_set, _ in answers}) < 3:
            body = await served_decoder.complete(**ask)
            answers.append((body["policy_set"], body["choices"][0]["text"]))

    async def publisher() -> list[str]:
        published = [old.id]
        for seed in (2, 1):
            while published[-1] not in [policy_set for policy_set, _ in answers]:  # noqa: ASYNC110  # looks as a person would
                await asyncio.sleep(0.05)
            published.append((await asyncio.to_thread(served_decoder.publish, "moving", seed=seed)).id)
        return published

    _, *_, sets = await asyncio.gather(*(caller() for _ in range(3)), publisher())

    texts = {policy_set: {text for named, text in answers if named == policy_set} for policy_set in sets}
    pinned = [await served_decoder.complete(policy_set=policy_set, **ask) for policy_set in sets]
    assert [texts[policy_set] for policy_set in sets] == [{body["choices"][0]["text"]} for body in pinned]
    assert texts[sets[0]] == texts[sets[2]] != texts[sets[1]]


async def test_nobody_waits_for_another_set_to_be_left(served_decoder: ServedDecoder) -> None:
    """A set that becomes current answers while a stream that began on the one before goes on, on its own set.

    All requests share the engine's steps: the stream's hundreds cannot be over before another's two, however quick the machine is.
    """
    old = served_decoder.publish("left", seed=1)
    new = served_decoder.publish("left", seed=2, activate=False)
    ask = {"model": "left", "preference_weights": WEIGHTS, "prompt": "Once upon a time"}
    long = ask | {"temperature": 0, "ignore_eos": True, "max_tokens": 900, "stream": True, "return_token_ids": True}
    seen: list[str] = []
    begun = asyncio.Event()

    async def read(stream: httpx.Response) -> None:
        async for line in stream.aiter_lines():
            seen.append(line)
            begun.set()

    async with (
        httpx.AsyncClient(base_url=served_decoder.url, timeout=300) as client,
        client.stream("POST", "/v1/completions", json=long) as stream,
    ):
        reading = asyncio.create_task(read(stream))
        await begun.wait()
        served_decoder.store.activate(new.id)
        meanwhile = await served_decoder.complete(**ask, max_tokens=2)
        still_streaming = not reading.done()
        await end_tasks(reading)

    chunks = [json.loads(line.removeprefix("data: ")) for line in seen if line]
    assert (meanwhile["policy_set"], still_streaming) == (new.id, True)
    assert {chunk["policy_set"] for chunk in chunks} == {old.id}
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]][:32]
    assert tokens == await served_decoder.tokens(policy_set=old.id, **ask, max_tokens=len(tokens))


async def test_more_sets_than_fit_are_served_in_turn(served_decoder: ServedDecoder) -> None:
    """Two sets stay in memory: with three, some are unloaded and loaded again, which no answer shows."""
    sets = [served_decoder.publish(f"turn{seed}", seed=seed) for seed in (1, 2, 3)]
    first = [await served_decoder.tokens("Once upon a time", model=policy_set.id, max_tokens=6) for policy_set in sets]
    again = [await served_decoder.tokens("Once upon a time", model=policy_set.id, max_tokens=6) for policy_set in sets]

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
    prompt = served_decoder.tokenizer("The fox and the crow went to the market. " * 7)["input_ids"]
    requests: list[dict[str, Any]] = [
        {"preference_weights": WEIGHTS},
        {"preference_weights": {"concise": 0.2, "warm": 0.8}},
        {"preference_weights": WEIGHTS, "mode": "soup"},
        {"preference_weights": {"concise": 0.2, "warm": 0.8}, "mode": "soup"},
        {"mode": "warm"},
        {"mode": "base"},
    ]

    async def ask(fields: dict[str, Any]) -> tuple[list[int], int]:
        body = await served_decoder.complete(prompt, max_tokens=4, model="demo", return_token_ids=True, **fields)
        details = body["usage"]["prompt_tokens_details"] or {}
        return body["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    first = [await ask(fields) for fields in requests]
    second = await asyncio.gather(*(ask(fields) for fields in requests))
    fresh = [await ask(fields | {"cache_salt": f"fresh {i}"}) for i, fields in enumerate(requests)]

    assert [tokens for tokens, _ in first] == [tokens for tokens, _ in second] == [tokens for tokens, _ in fresh]
    assert [cached > 0 for _, cached in first] == [False, True, False, False, False, False]
    assert all(cached > 0 for _, cached in second)
    assert not any(cached for _, cached in fresh)


async def test_it_sleeps_for_a_training_and_answers_as_before_when_it_wakes(served_decoder: ServedDecoder, demo: PolicySet) -> None:
    """A stream under way ends whole, what comes meanwhile is told to come back."""
    request = {"model": "demo", "preference_weights": WEIGHTS, "prompt": "Once upon a time", "max_tokens": 16}
    greedy = {"temperature": 0, "ignore_eos": True}
    before = await served_decoder.complete(**request)
    async with (
        httpx.AsyncClient(base_url=served_decoder.url, timeout=300) as client,
        client.stream("POST", "/v1/completions", json=request | greedy | {"stream": True}) as stream,
    ):
        lines = stream.aiter_lines()
        seen = [await anext(lines)]
        first = await client.post("/v1/sleep", json={"seconds": 60})
        refused = await served_decoder.post("/v1/completions", **request)
        ready = await client.get("/ready")
        seen += [line async for line in lines]
        while (await client.post("/v1/sleep", json={"seconds": 60})).json()["state"] != "asleep":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert (await client.get("/ready")).status_code == 503
        await client.post("/v1/wake")
        while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    after = await served_decoder.complete(**request)

    assert first.json() == {"state": "draining"}
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    assert ready.status_code == 503 and "training" in ready.json()["error"]["message"]
    *events, end = [line.removeprefix("data: ") for line in seen if line]
    texts = [before["choices"][0]["text"], after["choices"][0]["text"]]
    assert texts == 2 * ["".join(json.loads(event)["choices"][0]["text"] for event in events)] and end == "[DONE]"
    log = (served_decoder.workspace / "log").read_text()
    assert '"event": "asleep"' in log and '"event": "awake"' in log
