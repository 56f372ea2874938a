"""The decoder's greedy tokens are those of the exact reference decoder, token for token, in float32."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator

import pytest

from sipo.decoding.reference import ReferenceDecoder
from sipo.preferences import Weights
from support.decoder import ServedDecoder, random_adapter

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "Why does it rain? Explain it to a child.",
]
WEIGHTS: list[Weights] = [{"concise": w, "warm": 1 - w} for w in (1.0, 0.0, 0.5, 0.3)]
TOKENS = 10


class Parity:
    """The served decoder with one set ("parity"), and the reference with the same adapters."""

    def __init__(self, decoder: ServedDecoder) -> None:
        self.decoder = decoder
        policy_set = decoder.publish("parity", seed=1)
        self.prompts = [policy_set.manifest.prompt_format.prompt_ids(question, decoder.tokenizer) for question in QUESTIONS]
        self.reference = ReferenceDecoder(decoder.base, decoder.adapters(seed=1))

    def expected(self, prompt: list[int], weights: Weights) -> list[int]:
        return self.reference.generate(prompt, weights, max_tokens=TOKENS)

    async def served(self, prompt: list[int], weights: Weights | None, **fields: str) -> list[int]:
        return await self.decoder.tokens(prompt, model="parity", preference_weights=weights, max_tokens=TOKENS, **fields)


@pytest.fixture(scope="module")
def parity(served_decoder: ServedDecoder) -> Iterator[Parity]:
    return Parity(served_decoder)


@pytest.fixture(scope="module")
def expected(parity: Parity) -> dict[tuple[int, float], list[int]]:
    """By prompt and weight of the first objective."""
    return {(i, w["concise"]): parity.expected(prompt, w) for i, prompt in enumerate(parity.prompts) for w in WEIGHTS}


Expected = dict[tuple[int, float], list[int]]


async def test_requests_of_all_weights_in_one_batch_equal_the_reference(parity: Parity, expected: Expected) -> None:
    pairs = [(i, w) for i in range(len(QUESTIONS)) for w in WEIGHTS]

    served = await asyncio.gather(*(parity.served(parity.prompts[i], w) for i, w in pairs))

    assert {(i, w["concise"]): tokens for (i, w), tokens in zip(pairs, served, strict=True)} == expected


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
async def test_a_request_alone_equals_the_reference(parity: Parity, expected: Expected, weights: Weights) -> None:
    assert await parity.served(parity.prompts[1], weights) == expected[1, weights["concise"]]


def test_the_policies_differ_enough_for_parity_to_mean_something(expected: Expected) -> None:
    for i in range(len(QUESTIONS)):
        assert len({tuple(expected[i, w["concise"]]) for w in WEIGHTS}) > 1


async def test_other_modes_in_one_batch_equal_the_reference(parity: Parity) -> None:
    """A soup is the model with the exact weighted sum of the deltas, which PEFT merges as "cat"; a policy alone and the base are
    what they say. MOD requests run beside them."""
    prompt, weights = parity.prompts[1], WEIGHTS[3]
    model = parity.reference.model
    model.add_weighted_adapter(list(weights), list(weights.values()), "soup", combination_type="cat")
    soup = ReferenceDecoder.__new__(ReferenceDecoder)
    soup.model, soup.objectives = model, ("soup",)
    wanted_soup = soup.generate(prompt, {"soup": 1.0}, max_tokens=TOKENS)
    with model.disable_adapter():
        wanted_base = soup.generate(prompt, {"soup": 1.0}, max_tokens=TOKENS)

    served = await asyncio.gather(
        parity.served(prompt, weights, mode="soup"),
        parity.served(prompt, None, mode="base"),
        parity.served(prompt, None, mode="warm"),
        parity.served(prompt, weights),
    )

    assert served == [wanted_soup, wanted_base, parity.expected(prompt, WEIGHTS[1]), parity.expected(prompt, weights)]


async def test_policies_lie_on_top_of_their_sets_reference(parity: Parity) -> None:
    """The same policies as those of "parity", which answer beside them, from the base."""
    decoder, (_, prompt), weights = parity.decoder, parity.prompts, WEIGHTS[3]
    reference = random_adapter(decoder.base, decoder.workspace / "reference", seed=5, rank=4)
    decoder.publish("aligned", seed=1, reference=reference)
    exact = ReferenceDecoder(decoder.base, decoder.adapters(seed=1), reference=reference)
    linear = {"reference": 2.0, "base": -1.0}

    def ask(**fields: object) -> Coroutine[object, object, list[int]]:
        return decoder.tokens(prompt, model="aligned", max_tokens=TOKENS, **fields)

    served = await asyncio.gather(
        ask(preference_weights=weights),
        ask(mode="reference"),
        ask(mixing="linear", coefficients=linear),
        ask(mode="base"),
        parity.served(prompt, weights),
    )

    assert served == [
        exact.generate(prompt, weights, max_tokens=TOKENS),
        *(exact.generate(prompt, one, max_tokens=TOKENS, rule="linear") for one in ({"reference": 1.0}, linear, {"base": 1.0})),
        parity.expected(prompt, weights),
    ]
