"""The decoder's service without its engine: which mixture answers a request, which sets are in memory, what passes through."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.decoder.app import create_app
from services.decoder.choice import Choice, ChoiceFields, Chooser
from services.decoder.residency import ResidentSets, resident_key
from services.decoder.settings import DecoderSettings
from sipo.decoding.request import EXTRA_ARG, Mixture
from sipo.errors import IncompatiblePolicy, InvalidRequest, SipoError, Unavailable
from sipo.models import model_sha256
from sipo.policies import REFERENCE, AdapterRef, PolicySet, PolicyStore, adapter_sha256
from sipo.prompts import PromptFormat
from tests.fakes import FakeEngine, client_of, served, write_policy_set

OBJECTIVES = ["concise", "warm"]
WEIGHTS = {"concise": 0.7, "warm": 0.3}
SHA = "0" * 64


def publish(
    store: PolicyStore,
    identifier: str,
    objectives: list[str] = OBJECTIVES,
    base_sha256: str = SHA,
    prompt_format: PromptFormat | None = None,
    reference: str | None = None,
) -> PolicySet:
    """A current set as far as the decoder's service reads it; its adapters' files have only a name and a hash. `reference` is what
    those of its reference say."""
    manifest = write_policy_set(store.root, identifier, objectives, current=True, prompt_format=prompt_format)
    folder = store.root / identifier.replace(":", "/")
    contents = {objective: f"{identifier} {objective}" for objective in objectives}
    refs = {objective: write_adapter(folder / objective, content) for objective, content in contents.items()}
    changes = {
        "adapters": refs,
        "base": manifest.base.model_copy(update={"sha256": base_sha256}),
        "reference": write_adapter(folder / REFERENCE, reference) if reference else None,
    }
    (folder / "manifest.json").write_text(manifest.model_copy(update=changes).model_dump_json())
    return store.get(identifier)


def write_adapter(folder: Path, content: str) -> AdapterRef:
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(content)
    return AdapterRef(sha256=adapter_sha256(folder), rank=8)


@pytest.fixture
def store(data_dir: Path) -> PolicyStore:
    return PolicyStore(data_dir / "policies")


# Which mixture answers a request


def choose(store: PolicyStore, slots: int = 2, **fields: Any) -> list[tuple[tuple[float, ...], float]]:
    """The coefficients and weight of each slot."""
    choice = chooser(store, slots).choose(ChoiceFields(**fields))
    return [(entry.coefficients, entry.weight) for entry in choice.mixture.entries]


def chooser(store: PolicyStore, slots: int = 2) -> Chooser:
    return Chooser(store, DecoderSettings(data_dir=store.root.parent, decoder_slots=slots), SHA)


def test_every_mode_is_a_list_of_coefficients_and_weights(store: PolicyStore) -> None:
    publish(store, "demo:1")

    assert choose(store, model="demo", preference_weights=WEIGHTS) == [((1, 0), 0.7), ((0, 1), 0.3)]
    assert choose(store, model="demo:1") == [((1, 0), 0.5), ((0, 1), 0.5)]
    assert choose(store, model="demo@concise=0.7,warm=0.3", mode="soup") == [((0.7, 0.3), 1)]
    assert choose(store, policy_set="demo", mode="warm") == [((0, 1), 1)]
    assert choose(store, model="demo", mode="reference") == [((0, 0), 1)]
    assert (
        choose(store, model="demo", mode="base") == choose(store, model="base") == choose(store, model="smollm2-135m") == [((), 1)]
    )


def test_a_name_means_the_set_that_is_current_at_that_moment(store: PolicyStore) -> None:
    same = chooser(store)
    publish(store, "demo:1")
    before = choose_set(same, "demo")
    (store.root / "demo" / "current").unlink()
    publish(store, "demo:2")

    assert (before, choose_set(same, "demo"), choose_set(same, "demo:1")) == ("demo:1", "demo:2", "demo:1")


def choose_set(chooser: Chooser, model: str) -> str:
    [policy_set] = chooser.choose(ChoiceFields(model=model)).policy_sets
    return policy_set.id


def test_a_set_is_asked_in_its_own_chat_template(store: PolicyStore) -> None:
    own = PromptFormat(chat_template_sha256="0", chat_template="{{ messages }}")
    publish(store, "own:1", prompt_format=own)
    publish(store, "demo:1")
    templates = [
        chooser(store).choose(ChoiceFields(**fields)).chat_template
        for fields in ({"model": "own:1"}, {"model": "own:1", "mode": "base"}, {"model": "demo:1"}, {"model": "base"})
    ]
    assert templates == ["{{ messages }}", "{{ messages }}", None, None]


def test_a_rule_says_how_the_policies_are_mixed(store: PolicyStore) -> None:
    publish(store, "demo:1")
    same = chooser(store, slots=3)

    def ask(**fields: Any) -> Choice:
        return same.choose(ChoiceFields(model="demo", preference_weights=WEIGHTS, **fields))

    assert ask().mixture.rule == "reverse_kl"
    alpha = ask(mixing="alpha_divergence", mixing_alpha=0.5)
    assert (alpha.mixture.rule, alpha.mixture.alpha, alpha.effective["mixing"]) == ("alpha_divergence", 0.5, "alpha_divergence")
    jensen_shannon = ask(mixing="jensen_shannon").mixture
    assert [(entry.coefficients, entry.weight) for entry in jensen_shannon.entries] == [
        ((0, 0), 0),
        ((1, 0), 0.7),
        ((0, 1), 0.3),
    ]
    assert {entry.policy_set for entry in jensen_shannon.entries} == {resident_key(store.get("demo"))}


def test_linear_mixing_takes_the_base_and_policies_of_any_set(store: PolicyStore) -> None:
    demo, other = publish(store, "demo:1"), publish(store, "other:1", ["formal", "warm", "kind"])
    coefficients = {"base": 1, "warm": 1.5, "other:1/kind": -0.5}

    choice = chooser(store, slots=3).choose(ChoiceFields(model="demo", mixing="linear", coefficients=coefficients))

    assert [(entry.policy_set, entry.coefficients, entry.weight) for entry in choice.mixture.entries] == [
        ("", (), 1),
        (resident_key(demo), (0, 1), 1.5),
        (resident_key(other), (0, 0, 1), -0.5),
    ]
    assert [policy_set.id for policy_set in choice.policy_sets] == ["demo:1", "other:1"]
    assert choice.effective == {"policy_set": "demo:1", "mixing": "linear", "coefficients": coefficients}
    assert choose(store, slots=3, model="base", mixing="linear", coefficients={"base": 2, "demo/warm": 1}) == [((), 2), ((0, 1), 1)]


def test_linear_mixing_takes_the_reference_of_any_set(store: PolicyStore) -> None:
    demo, other = publish(store, "demo:1"), publish(store, "other:1", reference="tuned")
    coefficients = {"reference": 1, "warm": 1.5, "other:1/reference": -0.5}

    choice = chooser(store, slots=3).choose(ChoiceFields(model="demo", mixing="linear", coefficients=coefficients))

    assert [(entry.policy_set, entry.coefficients, entry.weight) for entry in choice.mixture.entries] == [
        (resident_key(demo), (0, 0), 1),
        (resident_key(demo), (0, 1), 1.5),
        (resident_key(other), (0, 0), -0.5),
    ]
    assert [policy_set.id for policy_set in choice.policy_sets] == ["demo:1", "other:1"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "base", "mode": "reference"}, "mode 'reference' needs a policy set, and this request names the base model"),
        ({"model": "demo", "mode": "reference", "preference_weights": WEIGHTS}, "'reference' has no policies to weigh"),
        ({"model": "demo", "mode": "reference", "mixing": "forward_kl"}, "one model, there is nothing to mix"),
        ({"model": "demo", "mode": "best"}, "this policy set has 'mod', 'soup', 'base', 'reference', 'concise', 'warm'"),
        (
            {"model": "base", "mixing": "linear", "coefficients": {"reference": 1}},
            "unknown model 'reference': this request names no policy set, and coefficients are for base, NAME:VERSION/OBJECTIVE "
            "and NAME:VERSION/reference of another set",
        ),
        (
            {"model": "demo", "mixing": "linear", "coefficients": {"kind": 1}},
            "unknown model 'kind': coefficients are for base, reference, concise, warm, NAME:VERSION/OBJECTIVE and NAME:VERSION/",
        ),
        ({"model": "demo", "mixing": "linear", "coefficients": {"demo/base": 1}}, "unknown model 'demo/base'"),
    ],
)
def test_who_asks_for_no_known_reference_hears_what_there_is(store: PolicyStore, fields: dict[str, Any], words: str) -> None:
    publish(store, "demo:1")

    with pytest.raises(InvalidRequest) as refusal:
        choose(store, **fields)
    assert words in refusal.value.message


def test_a_set_that_needs_more_slots_says_how_to_start_the_decoder(store: PolicyStore) -> None:
    publish(store, "three:1", ["a", "b", "c"])

    with pytest.raises(InvalidRequest, match="SIPO_DECODER_SLOTS=3"):
        choose(store, model="three")
    assert len(choose(store, model="three", slots=3)) == 3
    assert len(choose(store, model="three", mode="soup")) == 1

    publish(store, "nine:1", [f"o{i}" for i in range(9)])
    with pytest.raises(InvalidRequest, match="this decoder has 8 slots: ask for mode soup"):
        choose(store, model="nine", slots=8)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "demo", "mode": "best"},
        {"model": "demo", "mode": "warm", "preference_weights": WEIGHTS},
        {"model": "base", "mode": "soup"},
        {"model": "base", "preference_weights": WEIGHTS},
        {"model": "demo@concise=1,warm=0", "preference_weights": WEIGHTS},
        {"model": "demo", "mode": "base", "preference_weights": WEIGHTS},
        {"model": "demo", "preference_weights": {"concise": 10**400, "warm": 0}},
        {"model": "demo@concise", "preference_weights": None},
        {"model": "foreign"},
        {"model": "../demo"},
        {"model": "demo:" + "1" * 5000},
        {"model": "demo", "mixing": "best"},
        {"model": "demo", "mixing": "alpha_divergence"},
        {"model": "demo", "mixing": "alpha_divergence", "mixing_alpha": 1.0},
        {"model": "demo", "mixing": "alpha_divergence", "mixing_alpha": math.nan},
        {"model": "demo", "mixing_alpha": 0.5},
        {"model": "demo", "mixing": "jensen_shannon"},  # three entries for two slots
        {"model": "demo", "mixing": "forward_kl", "mode": "soup"},
        {"model": "base", "mixing": "forward_kl"},
        {"model": "demo", "coefficients": {"base": 1}},
        {"model": "demo", "mixing": "linear"},
        {"model": "demo", "mixing": "linear", "preference_weights": WEIGHTS},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": 1}, "mode": "mod"},
        {"model": "demo", "mixing": "linear", "coefficients": {}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": 0}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": 11}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": math.nan}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": math.inf}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": 10**400}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": "1"}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": True}},
        {"model": "demo", "mixing": "linear", "coefficients": {"kind": 1}},
        {"model": "demo", "mixing": "linear", "coefficients": {"../demo/warm": 1}},
        {"model": "demo", "mixing": "linear", "coefficients": {"foreign/warm": 1}},
        {"model": "base", "mixing": "linear", "coefficients": {"warm": 1}},
        {"model": "demo", "mixing": "linear", "coefficients": {"base": 1, "warm": 1, "concise": 1}},  # for two slots
    ],
)
def test_what_cannot_be_answered_is_refused(store: PolicyStore, fields: dict[str, Any]) -> None:
    publish(store, "demo:1")
    publish(store, "foreign:1", base_sha256="f" * 64)

    with pytest.raises(SipoError) as refusal:
        choose(store, **fields)
    assert refusal.value.status in (400, 404)


def test_the_salt_tells_apart_what_keys_and_values_depend_on_and_nothing_else(store: PolicyStore) -> None:
    publish(store, "demo:1")
    publish(store, "other:1")
    same = chooser(store)

    def salt(callers: str | None = None, **fields: Any) -> str:
        return same.choose(ChoiceFields(**fields)).mixture.cache_salt(callers)

    different = [
        salt(model="demo"),
        salt(model="demo", callers="mine"),
        salt(model="other"),
        salt(model="demo", mode="soup"),
        salt(model="demo@concise=1,warm=0", mode="soup"),
        salt(model="demo", mode="warm"),
        salt(model="demo", mode="reference"),
        salt(model="base"),
    ]
    assert len(set(different)) == len(different)
    assert salt(model="demo", preference_weights=WEIGHTS) == salt(model="demo@concise=0.2,warm=0.8") == different[0]
    assert salt(model="demo", mixing="forward_kl") == different[0]


# Which sets are in memory


async def test_the_set_unused_for_longest_makes_room(store: PolicyStore) -> None:
    engine = FakeEngine()
    residents = ResidentSets(engine, 2)
    a, b, c = (publish(store, f"{name}:1") for name in "abc")
    for policy_set in (a, b, a, c):
        async with residents.lease(policy_set):
            assert resident_key(policy_set) in engine.loaded

    assert engine.loaded == [resident_key(a), resident_key(c)]


async def test_the_engine_loads_the_reference_after_the_policies_and_the_sets_key_tells_it(store: PolicyStore) -> None:
    loaded: list[Mapping[str, Path]] = []

    class Engine(FakeEngine):
        async def load(self, key: str, adapters: Mapping[str, Path]) -> None:
            await super().load(key, adapters)
            loaded.append(adapters)

    keys = []
    for reference in (None, "tuned", "tuned again"):
        shutil.rmtree(store.root, ignore_errors=True)
        policy_set = publish(store, "demo:1", reference=reference)
        keys.append(resident_key(policy_set))
        async with ResidentSets(Engine(), 1).lease(policy_set):
            pass

    assert [list(adapters) for adapters in loaded] == [OBJECTIVES, [*OBJECTIVES, REFERENCE], [*OBJECTIVES, REFERENCE]]
    assert loaded[-1][REFERENCE] == policy_set.reference_dir
    assert len(set(keys)) == 3
    (policy_set.folder / REFERENCE / "adapter_model.safetensors").write_text("other")
    with pytest.raises(IncompatiblePolicy, match="'_reference' changed after publishing"):
        async with ResidentSets(Engine(), 1).lease(policy_set):
            pass


async def test_a_newcomer_does_not_wait_for_answers_on_older_sets_to_end(store: PolicyStore) -> None:
    engine = FakeEngine()
    residents = ResidentSets(engine, 1)
    a, b, c = (publish(store, f"{name}:1") for name in "abc")

    async with residents.lease(a):
        async with residents.lease(b):
            assert engine.loaded == [resident_key(a), resident_key(b)]
            with pytest.raises(Unavailable, match="c:1 is not in memory"):
                async with residents.lease(c):
                    pass
        assert engine.loaded == [resident_key(a)]
    async with residents.lease(b):
        pass
    assert engine.loaded == [resident_key(b)]


async def test_idle_sets_leave_an_engine_that_has_no_room_for_another(store: PolicyStore) -> None:
    engine = FakeEngine()
    engine.room = 2
    residents = ResidentSets(engine, 3)
    a, b, c = (publish(store, f"{name}:1") for name in "abc")
    async with residents.lease(a):
        pass

    async with residents.lease(b):
        async with residents.lease(c):
            assert engine.loaded == [resident_key(b), resident_key(c)]
            with pytest.raises(Unavailable, match="no room"):
                async with residents.lease(a):
                    pass
            assert engine.loaded == [resident_key(b), resident_key(c)]
        async with residents.lease(a):
            assert engine.loaded == [resident_key(b), resident_key(a)]


async def test_a_set_is_loaded_once_for_many_requests_at_once(store: PolicyStore) -> None:
    engine = FakeEngine()
    residents = ResidentSets(engine, 2)
    a = publish(store, "a:1")

    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(residents.lease(a)) for _ in range(5)))
        assert engine.loaded == [resident_key(a)]


async def test_a_refused_set_leaves_the_others_where_they_are(store: PolicyStore) -> None:
    engine = FakeEngine()
    engine.broken = "bad"
    residents = ResidentSets(engine, 1)
    good, bad, tampered = publish(store, "good:1"), publish(store, "bad:1"), publish(store, "tampered:1")
    (tampered.adapter_dir("warm") / "adapter_model.safetensors").write_text("other")
    async with residents.lease(good):
        pass

    for refused in (bad, tampered):
        with pytest.raises(IncompatiblePolicy):
            async with residents.lease(refused):
                pass
    assert engine.loaded == [resident_key(good)]
    async with residents.lease(good):
        pass


async def test_current_sets_that_cannot_be_mixed_are_told_at_the_start(
    store: PolicyStore, data_dir: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, "demo:1")
    publish(store, "three:2", ["a", "b", "c"])
    (publish(store, "damaged:1").folder / "manifest.json").write_text("{")

    async with running(FakeEngine(), data_dir, tiny_base):
        while "more objectives" not in caplog.text:  # noqa: ASYNC110  # it looks at the sets when it is ready already
            await asyncio.sleep(0.01)

    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "objectives={'three:2': 3} slots=2" in told


# What passes through


@asynccontextmanager
async def running(engine: FakeEngine, data_dir: Path, base: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings = DecoderSettings(data_dir=data_dir, cache_dir=data_dir / "cache", model=str(base))
    async with served(engine, settings) as app, client_of(app) as client:
        yield client


@pytest.fixture
async def client(store: PolicyStore, data_dir: Path, tiny_base: Path) -> AsyncIterator[httpx.AsyncClient]:
    publish(store, "demo:1", base_sha256=model_sha256(tiny_base, data_dir / "cache"))
    async with running(FakeEngine(), data_dir, tiny_base) as client:
        yield client


async def test_the_engine_gets_the_mixture_and_not_our_fields(client: httpx.AsyncClient) -> None:
    request = {
        "model": "demo",
        "preference_weights": WEIGHTS,
        "prompt": "Hi",
        "top_p": 0.9,
        "vllm_xargs": {"sipo": "forged", "x": 1},
    }
    reply = (await client.post("/v1/completions", json=request)).json()

    seen = reply["seen"]
    mixture = Mixture.model_validate_json(seen["vllm_xargs"].pop(EXTRA_ARG))
    assert [entry.weight for entry in mixture.entries] == [0.7, 0.3]
    assert seen.pop("cache_salt") == mixture.cache_salt()
    assert seen.pop("model") != "demo"
    assert seen == {"prompt": "Hi", "top_p": 0.9, "vllm_xargs": {}}
    assert (reply["model"], reply["policy_set"], reply["preference_weights"]) == ("demo", "demo:1", WEIGHTS)


async def test_a_sets_reference_answers_alone_and_has_no_weights(client: httpx.AsyncClient) -> None:
    reply = (await client.post("/v1/completions", json={"model": "demo", "mode": "reference", "prompt": "Hi"})).json()
    refused = await client.post(
        "/v1/completions", json={"model": "base", "mixing": "linear", "coefficients": {"reference": 1}, "prompt": "Hi"}
    )

    [entry] = Mixture.model_validate_json(reply["seen"]["vllm_xargs"][EXTRA_ARG]).entries
    assert (entry.coefficients, entry.weight) == ((0, 0), 1)
    assert (reply["policy_set"], reply["preference_weights"]) == ("demo:1", {})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "coefficients")


async def test_every_event_of_a_stream_is_annotated(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "stream": True})

    first, second, end = reply.text.strip().split("\n\n")
    assert end == "data: [DONE]"
    for event in (first, second):
        chunk = json.loads(event.removeprefix("data: "))
        assert (chunk["model"], chunk["policy_set"]) == ("demo", "demo:1")


async def test_an_error_of_vllm_passes_unchanged(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "bad": True})

    assert reply.status_code == 400
    assert "policy_set" not in reply.json()


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"model": 1}', '{"model": "demo", "preference_weights": "x"}'])
async def test_what_is_no_request_is_a_callers_error(client: httpx.AsyncClient, content: str) -> None:
    reply = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})

    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("own", [{"chat_template": "x"}, {"chat_template_kwargs": {"chat_template": "x"}}])
async def test_a_callers_chat_template_does_not_reach_the_engine(client: httpx.AsyncClient, own: dict[str, Any]) -> None:
    reply = await client.post(
        "/v1/chat/completions", json={"model": "demo", "messages": [{"role": "user", "content": "Hi"}], **own}
    )

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template")


@pytest.mark.parametrize("empty", [{"prompt": ""}, {"prompt": []}, {"prompt": ["Hi", ""]}, {"messages": [{"role": "user"}]}])
async def test_an_empty_prompt_does_not_reach_the_engine(client: httpx.AsyncClient, empty: dict[str, Any]) -> None:
    reply = await client.post("/v1/completions", json={"model": "demo", **empty})

    error = reply.json()["error"]
    assert (reply.status_code, [error["param"]]) == (400, list(empty))
    assert "empty" in error["message"]


async def test_until_the_engine_is_there_requests_are_told_to_come_back(data_dir: Path, tiny_base: Path) -> None:
    @asynccontextmanager
    async def never(_model: Path) -> AsyncIterator[FakeEngine]:
        await asyncio.Event().wait()
        yield FakeEngine()

    app = create_app(DecoderSettings(data_dir=data_dir, cache_dir=data_dir / "cache", model=str(tiny_base)), never)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://decoder") as client,
    ):
        ready = await client.get("/ready")
        reply = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi"})

    assert ready.status_code == reply.status_code == 503
    assert "being loaded" in ready.json()["error"]["message"]
