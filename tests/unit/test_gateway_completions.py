"""What the gateway promises about completions, with a fake decoder behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from gateway.app import create_app
from gateway.settings import GatewaySettings
from sipo.prompts import PromptFormat
from tests.fakes import FakeDecoder, write_policy_set

MESSAGES = [{"role": "user", "content": "How do I boil an egg?"}]


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def gateway(tmp_path: Path, decoder: FakeDecoder) -> httpx.AsyncClient:
    """Two versions of "demo", the first of them current."""
    write_policy_set(tmp_path / "policies", "demo:1", ["concise", "warm"], current=True)
    write_policy_set(tmp_path / "policies", "demo:2", ["concise", "warm"])
    upstream = httpx.AsyncClient(transport=httpx.ASGITransport(decoder.app), base_url="http://decoder")
    app = create_app(GatewaySettings(data_dir=tmp_path), upstream, Redis())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def ask(gateway: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await gateway.post("/v1/chat/completions", json={"messages": MESSAGES, **body})


async def test_a_policy_name_means_its_current_set(gateway: httpx.AsyncClient, decoder: FakeDecoder) -> None:
    reply = await ask(gateway, model="demo")
    assert reply.status_code == 200
    [body] = decoder.bodies
    assert body["policy_set"] == "demo:1"
    assert body["priority"] == 0
    assert reply.json()["policy_set"] == "demo:1"


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "warm"},
        {"mixing": "alpha_divergence", "mixing_alpha": 0.5},
        {"mixing": "linear", "coefficients": {"base": 1, "warm": -0.5}},
    ],
)
async def test_how_policies_are_mixed_is_the_decoders_to_check_and_comes_without_weights_of_ours(
    gateway: httpx.AsyncClient, decoder: FakeDecoder, fields: dict[str, Any]
) -> None:
    assert (await ask(gateway, model="demo", **fields)).status_code == 200
    [body] = decoder.bodies
    assert "preference_weights" not in body
    assert {name: body[name] for name in fields} == fields


@pytest.mark.parametrize(
    "request_",
    [
        {"model": "demo:2@warm=0.3,concise=0.7"},
        {"model": "demo:2", "preference_weights": {"warm": 0.3, "concise": 0.7}},
        {"model": "demo:2", "preference_weights": {"warm": 0.3001, "concise": 0.7002}},
    ],
)
async def test_weights_reach_the_decoder_normalised_in_the_sets_order(
    gateway: httpx.AsyncClient, decoder: FakeDecoder, request_: dict[str, Any]
) -> None:
    assert (await ask(gateway, **request_)).status_code == 200
    weights = decoder.bodies[0]["preference_weights"]
    assert list(weights) == ["concise", "warm"]
    assert weights["concise"] == pytest.approx(0.7, abs=1e-4)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)


async def test_policies_with_a_system_text_get_it(gateway: httpx.AsyncClient, decoder: FakeDecoder, tmp_path: Path) -> None:
    kind = PromptFormat(system="be kind")
    write_policy_set(tmp_path / "policies", "kind:1", ["concise", "warm"], current=True, prompt_format=kind)
    assert (await ask(gateway, model="kind")).status_code == 200
    assert decoder.bodies[0]["messages"] == [{"role": "system", "content": "be kind"}, *MESSAGES]
    own = [{"role": "system", "content": "be brief"}, *MESSAGES]
    assert (await ask(gateway, model="kind", messages=own)).status_code == 200
    assert decoder.bodies[1]["messages"] == own


async def test_the_base_model_is_asked_without_weights(gateway: httpx.AsyncClient, decoder: FakeDecoder) -> None:
    assert (await ask(gateway, model="base")).status_code == 200
    assert decoder.bodies[0]["model"] == "base"
    assert "preference_weights" not in decoder.bodies[0]
    assert "policy_set" not in decoder.bodies[0]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"model": "demo", "preference_weights": {"concise": 1.2, "warm": -0.2}}, 400, "preference_weights", "-0.2"),
        ({"model": "demo", "preference_weights": {"concise": 0.7, "warm": 0.7}}, 400, "preference_weights", "sum to 1.4"),
        ({"model": "demo", "preference_weights": {"concise": 1.0}}, 400, "preference_weights", "no weight for 'warm'"),
        (
            {"model": "demo", "preference_weights": {"concise": 0.5, "kind": 0.5}},
            400,
            "preference_weights",
            "unknown objective 'kind'",
        ),
        ({"model": "demo", "preference_weights": {"concise": True, "warm": 0}}, 400, "preference_weights.concise", "number"),
        ({"model": "demo@concise=a", "messages": MESSAGES}, 400, "model", "cannot read"),
        ({"model": "demo@concise=1,warm=0", "preference_weights": {"concise": 1, "warm": 0}}, 400, "preference_weights", "once"),
        ({"model": "base@concise=1"}, 400, "model", "no objectives"),
        ({"model": "demo:9"}, 404, "model", "demo:1, demo:2"),
        ({"model": "other"}, 404, "model", "demo"),
        ({}, 400, "model", "required"),
        ({"model": "demo", "messages": []}, 400, "messages", "at least 1"),
        ({"model": "demo", "messages": [{"role": "user", "content": ""}]}, 400, "messages", "empty"),
        ({"model": "demo", "prompt_logprobs": 1}, 400, "prompt_logprobs", "not supported"),
    ],
)
async def test_a_wrong_request_is_refused_in_openais_shape_and_never_reaches_the_decoder(
    gateway: httpx.AsyncClient, decoder: FakeDecoder, body: dict[str, Any], status: int, param: str, words: str
) -> None:
    reply = await ask(gateway, **body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]
    assert decoder.bodies == []


async def test_only_known_fields_are_passed_on(gateway: httpx.AsyncClient, decoder: FakeDecoder) -> None:
    extras = {
        "vllm_xargs": {"a": 1},
        "priority": -5,
        "chat_template": "x",
        "mood": "good",
        "policy_set": "demo:2",
        "cache_salt": "mine",
    }
    reply = await ask(gateway, model="demo", temperature=0.2, top_k=5, stop=["\n"], **extras)
    assert reply.status_code == 200
    body = decoder.bodies[0]
    assert (body["temperature"], body["top_k"], body["stop"], body["cache_salt"]) == (0.2, 5, ["\n"], "mine")
    assert (body["priority"], body["policy_set"]) == (0, "demo:1")
    assert not {"vllm_xargs", "chat_template", "mood"} & set(body)


async def test_plain_completions_go_the_same_way(gateway: httpx.AsyncClient, decoder: FakeDecoder) -> None:
    reply = await gateway.post("/v1/completions", json={"model": "demo@concise=1,warm=0", "prompt": "Once"})
    assert reply.json()["choices"][0]["text"] == decoder.answer
    assert decoder.bodies[0]["prompt"] == "Once"
    for prompt in ("", [], [""], [[]]):
        empty = await gateway.post("/v1/completions", json={"model": "demo", "prompt": prompt})
        assert (empty.status_code, empty.json()["error"]["param"]) == (400, "prompt")


async def test_the_decoders_errors_come_through(gateway: httpx.AsyncClient, decoder: FakeDecoder) -> None:
    vllm = {"error": {"message": "the prompt is too long", "type": "BadRequestError", "param": "messages", "code": 400}}
    decoder.error = (400, vllm)
    for stream in (False, True):
        reply = await ask(gateway, model="demo", stream=stream)
        assert (reply.status_code, reply.json()) == (400, vllm)
    decoder.error = (502, {"detail": "bad gateway"})
    reply = await ask(gateway, model="demo")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    for error in ((500, {}), (404, {"detail": "Not Found"})):  # the caller asked for nothing that a decoder has not
        decoder.error = error
        reply = await ask(gateway, model="demo")
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    full = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "429"}}
    for status in (429, 503):
        decoder.error = (status, full)
        reply = await ask(gateway, model="demo")
        assert (reply.status_code, reply.json(), reply.headers["retry-after"]) == (status, full, "5")


async def test_a_decoder_that_is_down_means_503_with_retry_after(tmp_path: Path) -> None:
    write_policy_set(tmp_path / "policies", "demo:1", ["concise", "warm"], current=True)
    nowhere = httpx.AsyncClient(base_url="http://127.0.0.1:9")
    app = create_app(GatewaySettings(data_dir=tmp_path), nowhere, Redis())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as gateway:
        reply = await ask(gateway, model="demo")
    assert reply.status_code == 503
    assert float(reply.headers["retry-after"]) > 0
    assert reply.json()["error"]["code"] == "unavailable"


async def test_models_lists_names_versions_and_the_base(gateway: httpx.AsyncClient) -> None:
    models = {model["id"]: model for model in (await gateway.get("/v1/models")).json()["data"]}
    assert list(models) == ["demo", "demo:1", "demo:2", "base"]
    assert (models["demo"]["root"], models["demo"]["current"], models["demo:2"]["current"]) == ("demo:1", True, False)
    assert models["demo"]["objectives"] == ["concise", "warm"]
    assert models["demo"]["default_weights"] == {"concise": 0.5, "warm": 0.5}
    assert (models["base"]["root"], models["base"]["objectives"]) == ("smollm2-135m", [])


async def test_a_model_is_found_by_every_name_that_a_request_may_give(gateway: httpx.AsyncClient) -> None:
    assert (await gateway.get("/v1/models/demo")).json()["root"] == "demo:1"
    assert (await gateway.get("/v1/models/demo:2")).json()["id"] == "demo:2"
    weighted = (await gateway.get("/v1/models/demo@concise=0.7,warm=0.3")).json()
    assert weighted["default_weights"] == {"concise": 0.7, "warm": 0.3}
    missing = await gateway.get("/v1/models/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
