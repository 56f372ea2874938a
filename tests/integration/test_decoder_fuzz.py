"""No request body, however odd, is answered by a server error or disturbs another request of the batch."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.decoder import ServedDecoder

pytestmark = pytest.mark.slow

WEIGHTS = {"concise": 0.5, "warm": 0.5}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, -(2**63), 2**64, 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
    st.sampled_from(
        [
            *("base", "reference", "mod", "soup", "linear", "jensen_shannon", "warm"),
            *("fuzz:1", "fuzz", "../fuzz", "fuzz/warm", "\\u0000"),
        ]
    ),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=6,
)
weights = st.dictionaries(st.sampled_from(["concise", "warm", "base", "reference", "fuzz/warm", "x"]), scalars, max_size=3)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": scalars,
    "policy_set": scalars,
    "preference_weights": weights | anything,
    "mode": scalars,
    "mixing": scalars,
    "mixing_alpha": scalars,
    "coefficients": weights | anything,
    "cache_salt": scalars,
    "prompt": anything,
    "max_tokens": st.sampled_from([0, -1, 1, 3, "3", 1.5, -(10**9)]),
    "n": st.sampled_from([None, 0, -1, 1, 3, 2**40, "2"]),
    **dict.fromkeys(
        [
            *("allowed_token_ids", "bad_words", "best_of", "echo", "frequency_penalty", "ignore_eos", "kv_transfer_params"),
            *(
                "length_penalty",
                "logit_bias",
                "logits_processors",
                "logprobs",
                "messages",
                "min_p",
                "min_tokens",
                "presence_penalty",
            ),
            *("priority", "prompt_embeds", "prompt_logprobs", "repetition_penalty", "request_id", "response_format", "seed"),
            *("skip_special_tokens", "stop", "stop_token_ids", "stream", "stream_options", "structured_outputs", "suffix"),
            *(
                "temperature",
                "top_k",
                "top_p",
                "truncate_prompt_tokens",
                "use_beam_search",
                "user",
                "vllm_xargs",
                "add_special_tokens",
            ),
        ],
        anything,
    ),
}
bodies = st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


@pytest.fixture(scope="module")
def neighbour(served_decoder: ServedDecoder) -> Iterator[list[str]]:
    """The answers to one good request, asked again and again while the odd ones come."""
    served_decoder.publish("fuzz", seed=1)
    answers: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        body = {"model": "fuzz", "preference_weights": WEIGHTS, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
        with httpx.Client(base_url=served_decoder.url, timeout=300) as client:
            while not stop.is_set():
                reply = client.post("/v1/completions", json=body)
                answers.append(reply.text if reply.is_error else reply.json()["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    yield answers
    stop.set()
    thread.join()


@pytest.fixture(scope="module")
def client(served_decoder: ServedDecoder) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served_decoder.url, timeout=300) as client:
        yield client


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_odd_bodies_are_the_callers_errors(client: httpx.Client, neighbour: list[str], route: str) -> None:
    prompt: dict[str, Any] = {"prompt": "Hello"}
    if route == "/v1/chat/completions":
        prompt = {"messages": [{"role": "user", "content": "Hello"}]}

    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(fields=bodies)
    def ask(fields: dict[str, Any]) -> None:
        body = {"model": "fuzz", "max_tokens": 2, **prompt, **fields}
        reply = client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
        assert reply.status_code < 500, (body, reply.text)
        if reply.is_error:
            assert reply.json()["error"]["message"], (body, reply.text)

    ask()
    assert neighbour
    assert len(set(neighbour)) == 1
    assert client.get("/ready").status_code == 200
