"""What vLLM's users expect of a completion, over HTTP: it works, and it means the mixed distribution."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from sipo.decoding.reference import ReferenceDecoder
from sipo.policies import PolicySet
from support.decoder import ServedDecoder

pytestmark = pytest.mark.slow

WEIGHTS = {"concise": 0.6, "warm": 0.4}
QUESTION = "What is the capital of France?"
HOT = 2.0
"""The highest temperature that vLLM takes."""


class Mixed:
    """One prompt, and the mixture's exact log-probabilities of the token after it."""

    def __init__(self, decoder: ServedDecoder) -> None:
        self.decoder = decoder
        self.set: PolicySet = decoder.publish("sampling", seed=1)
        self.prompt = self.set.manifest.prompt_format.prompt_ids(QUESTION, decoder.tokenizer)
        self.reference = ReferenceDecoder(decoder.base, decoder.adapters(seed=1))
        self.log_probs: Tensor = self.reference.next_log_probs(self.prompt, WEIGHTS)
        self.ranked: list[int] = self.log_probs.argsort(descending=True).tolist()

    async def ask(self, **fields: Any) -> dict[str, Any]:
        return await self.decoder.complete(
            self.prompt, model="sampling", preference_weights=WEIGHTS, return_token_ids=True, **fields
        )

    async def tokens(self, **fields: Any) -> list[int]:
        ids: list[int] = (await self.ask(**fields))["choices"][0]["token_ids"]
        return ids

    async def drawn(self, **fields: Any) -> set[int]:
        """The first tokens of many hot samples."""
        body = await self.ask(max_tokens=1, n=64, temperature=HOT, seed=1, **fields)
        return {choice["token_ids"][0] for choice in body["choices"]}


@pytest.fixture(scope="module")
def mixed(served_decoder: ServedDecoder) -> Mixed:
    return Mixed(served_decoder)


async def test_logprobs_are_the_mixtures(mixed: Mixed) -> None:
    body = await mixed.ask(max_tokens=1, logprobs=5, return_tokens_as_token_ids=True)

    top = body["choices"][0]["logprobs"]["top_logprobs"][0]
    got = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
    assert got == {token: pytest.approx(mixed.log_probs[token].item(), abs=1e-3) for token in mixed.ranked[:5]}


async def test_top_k_top_p_and_min_p_cut_the_mixed_distribution(mixed: Mixed) -> None:
    probs = (mixed.log_probs / HOT).softmax(-1)
    ranked = probs[mixed.ranked]
    nucleus = int((ranked.cumsum(0) - ranked < 0.1).sum())
    likely = int((ranked >= 0.3 * ranked[0]).sum())

    by_top_k, by_top_p, by_min_p = await asyncio.gather(mixed.drawn(top_k=3), mixed.drawn(top_p=0.1), mixed.drawn(min_p=0.3))

    for drawn, allowed in ((by_top_k, 3), (by_top_p, nucleus), (by_min_p, likely)):
        assert len(drawn) > 1
        assert drawn <= set(mixed.ranked[:allowed])


async def test_many_samples_have_the_mixtures_frequencies(mixed: Mixed) -> None:
    """Over the mixture's top ten at temperature 2: 256 samples, within four standard deviations each."""
    asked = [mixed.ask(max_tokens=1, n=64, temperature=2.0, top_k=10, seed=seed) for seed in range(0, 4000, 1000)]
    drawn = [choice["token_ids"][0] for body in await asyncio.gather(*asked) for choice in body["choices"]]

    expected = (mixed.log_probs[mixed.ranked[:10]] / 2).softmax(-1)
    for token, p in zip(mixed.ranked[:10], expected.tolist(), strict=True):
        spread = (p * (1 - p) / len(drawn)) ** 0.5
        assert drawn.count(token) / len(drawn) == pytest.approx(p, abs=4 * spread)


async def test_a_seed_repeats_itself_and_n_samples_differ(mixed: Mixed) -> None:
    first, again, other = await asyncio.gather(*(mixed.ask(max_tokens=12, temperature=1.5, n=3, seed=seed) for seed in (5, 5, 6)))

    def texts(body: dict[str, Any]) -> list[str]:
        return [choice["text"] for choice in body["choices"]]

    assert texts(first) == texts(again) != texts(other)
    assert len(set(texts(first))) == 3


async def test_logit_bias_bans_and_forces_tokens(mixed: Mixed) -> None:
    best, second, *_ = mixed.ranked

    assert (await mixed.tokens(max_tokens=1))[0] == best
    assert (await mixed.tokens(max_tokens=1, logit_bias={str(best): -100}))[0] == second
    assert (await mixed.tokens(max_tokens=1, logit_bias={str(mixed.ranked[500]): 100}))[0] == mixed.ranked[500]
    assert (await mixed.tokens(max_tokens=1, allowed_token_ids=mixed.ranked[30:40]))[0] == mixed.ranked[30]


async def test_penalties_lower_what_was_said_before(mixed: Mixed) -> None:
    """Greedy with a presence penalty, step by step on the reference's distribution."""
    penalty, expected = 2.0, list[int]()
    for _ in range(6):
        log_probs = mixed.reference.next_log_probs([*mixed.prompt, *expected], WEIGHTS).clone()
        log_probs[torch.tensor(sorted(set(expected)), dtype=torch.long)] -= penalty
        expected.append(int(log_probs.argmax()))

    assert await mixed.tokens(max_tokens=6, presence_penalty=penalty) == expected
    assert await mixed.tokens(max_tokens=8) != await mixed.tokens(max_tokens=8, repetition_penalty=2.0)


async def test_stop_ends_before_the_word(mixed: Mixed) -> None:
    whole = (await mixed.ask(max_tokens=16))["choices"][0]["text"]
    word = whole[len(whole) // 2 :][:3]

    stopped = (await mixed.ask(max_tokens=16, stop=[word]))["choices"][0]

    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(word)]


async def test_structured_outputs_are_chosen_by_the_mixture(mixed: Mixed) -> None:
    choices = ["Paris", "London", "a city"]

    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}

    async def text(**fields: Any) -> str:
        reply = await mixed.decoder.post(
            "/v1/completions", model="sampling", preference_weights=WEIGHTS, prompt=mixed.prompt, max_tokens=40, **fields
        )
        assert reply.status_code == 200, reply.text
        written: str = reply.json()["choices"][0]["text"]
        return written

    chosen = await text(structured_outputs={"choice": choices})
    number = await text(structured_outputs={"regex": "[0-9]{3}"})
    data = await text(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})

    pieces = (mixed.decoder.tokenizer.decode(token) for token in mixed.ranked)
    likeliest = next(piece for piece in pieces if any(choice.startswith(piece) for choice in choices))
    assert chosen in choices
    assert chosen.startswith(likeliest)
    assert number.isdecimal()
    assert len(number) == 3
    assert json.loads(data)["city"] in ("Paris", "Rome")


async def test_a_named_tool_is_called(mixed: Mixed) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    reply = await mixed.decoder.post(
        "/v1/chat/completions",
        model="sampling",
        preference_weights=WEIGHTS,
        messages=[{"role": "user", "content": "Weather in Paris?"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters, "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=80,
    )

    assert reply.status_code == 200, reply.text
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
