"""Implicit rewards: what the packed, stacked pass computes is what plain transformers with PEFT compute one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sipo.errors import IncompatiblePolicy, InvalidRequest, NotFound
from sipo.lora import ADAPTABLE_MODULES
from sipo.policies import PolicyStore
from sipo.preferences import Weights, sampling_weights
from sipo.prompts import PromptFormat
from sipo.rewards import Group, RewardModel, Rewards, per_token
from sipo.rewards.model import LOGIT_ROWS
from tests.policies import publish_random, rewards_one_by_one

RAW = PromptFormat(kind="raw", template="{prompt}\n")
OBJECTIVES = ["helpful", "harmless"]
SOUPS = sampling_weights(OBJECTIVES)
PROMPT = [11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> PolicyStore:
    """demo:1 changes other layers per objective; demo:2 and demo:3 differ from it only in their values."""
    folder = tmp_path_factory.mktemp("store")
    store = PolicyStore(folder / "policies")
    targets = {"helpful": ADAPTABLE_MODULES, "harmless": ("q_proj", "v_proj", "down_proj")}
    for seed in (1, 2, 3):
        publish_random(store, base, folder, targets, base_sha256="tiny", prompt_format=RAW, seed=seed)
    return store


@pytest.fixture(scope="module")
def model(base: Path, store: PolicyStore) -> RewardModel:
    return RewardModel.load(base, store, base_sha256="tiny")


def responses(count: int, *, longest: int = 20, seed: int = 0) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(300) for _ in range(drawn.randint(1, longest))] for _ in range(count)]


def score(
    model: RewardModel, policy_set: str, prompt: Sequence[int], answers: Sequence[Sequence[int]], soups: Sequence[Weights] = ()
) -> list[Rewards]:
    [rewards] = model.score(policy_set, [Group(prompt, answers)], soups)
    return rewards


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]], tolerance: float = 1e-3) -> None:
    assert [list(rewards) for rewards in found] == [list(rewards) for rewards in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


def test_rewards_of_policies_and_soups_agree_with_peft_one_by_one(base: Path, store: PolicyStore, model: RewardModel) -> None:
    answers = responses(6)
    wanted = rewards_one_by_one(base, store.get("demo:1"), PROMPT, answers, SOUPS)
    assert max(abs(value) for rewards in wanted for value in rewards.values()) > 0.5
    assert_close(score(model, "demo:1", PROMPT, answers, SOUPS), wanted)


def test_the_reference_is_beneath_every_model_of_its_set(base: Path, tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policies")
    targets = {"helpful": ("q_proj", "v_proj"), "harmless": ("down_proj",)}
    common = {"base_sha256": "tiny", "prompt_format": RAW, "scale": 0.2}
    policy_set = publish_random(store, base, tmp_path, targets, reference=("q_proj", "up_proj"), **common)
    publish_random(store, base, tmp_path, targets, seed=1, **common)
    model, answers = RewardModel.load(base, store, base_sha256="tiny"), responses(4)
    assert_close(
        score(model, "demo:1", PROMPT, answers, SOUPS), wanted := rewards_one_by_one(base, policy_set, PROMPT, answers, SOUPS)
    )
    assert min(abs(value) for rewards in wanted for value in rewards.values()) > 0.01
    plain = rewards_one_by_one(base, store.get("demo:2"), PROMPT, answers, SOUPS)
    assert_close(score(model, "demo:2", PROMPT, answers, SOUPS), plain)


def test_the_other_responses_in_a_batch_and_its_cut_into_passes_change_no_value(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = responses(9, seed=1)
    together = score(model, "demo:1", PROMPT, answers, SOUPS)
    assert_close([score(model, "demo:1", PROMPT, [answer], SOUPS)[0] for answer in answers], together)
    assert_close(score(model, "demo:1", PROMPT, answers[::-1], SOUPS)[::-1], together)
    for budget in (40, 300):
        monkeypatch.setattr(model, "token_budget", budget)
        assert_close(score(model, "demo:1", PROMPT, answers, SOUPS), together)


def test_prompts_that_share_passes_change_no_value(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = random.Random(4)
    groups = [
        Group([drawn.randrange(300) for _ in range(drawn.randint(1, 30))], responses(drawn.randint(1, 5), seed=seed))
        for seed in range(8)
    ]
    alone = [model.score("demo:1", [group], SOUPS)[0] for group in groups]
    for budget in (40, 500, 5000):
        monkeypatch.setattr(model, "token_budget", budget)
        passes = count_passes(model, monkeypatch)
        found = model.score("demo:1", groups, SOUPS)
        assert [len(rewards) for rewards in found] == [len(group.responses) for group in groups]
        for one, other in zip(found, alone, strict=True):
            assert_close(one, other)
    assert passes == [7]  # at the largest budget one pass with all seven models and all prompts in it


def test_no_tensor_has_a_vocabulary_for_every_position(base: Path, store: PolicyStore) -> None:
    model = RewardModel.load(base, store, base_sha256="tiny", token_budget=10_000)
    answers = responses(40, seed=5)
    tokens = 7 * sum(map(len, answers))
    with Largest() as seen:
        score(model, "demo:1", PROMPT, answers, SOUPS)
    assert seen.vocabularies == LOGIT_ROWS < tokens / 10


def test_three_objectives_have_three_policies_and_the_soups_of_their_grid(base: Path, tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policies")
    targets: dict[str, tuple[str, ...]] = {"helpful": ADAPTABLE_MODULES, "harmless": ("q_proj", "o_proj"), "brief": ("down_proj",)}
    policy_set = publish_random(store, base, tmp_path, targets, base_sha256="tiny", prompt_format=RAW)
    soups = sampling_weights(list(targets))
    answers = responses(3, seed=7)
    found = score(RewardModel.load(base, store, base_sha256="tiny"), "demo:1", PROMPT, answers, soups)
    assert len(found[0]) == 3 + 4  # uniform, and the midpoint of every two
    assert_close(found, rewards_one_by_one(base, policy_set, PROMPT, answers, soups))


def test_soups_beside_them_change_no_reward_of_the_policies(model: RewardModel) -> None:
    answers = responses(3, seed=2)
    alone = score(model, "demo:1", PROMPT, answers)
    beside = [{name: rewards[name] for name in OBJECTIVES} for rewards in score(model, "demo:1", PROMPT, answers, SOUPS)]
    assert_close(alone, beside)


def test_a_one_hot_soup_is_the_policy_itself(model: RewardModel) -> None:
    rewards = score(model, "demo:1", PROMPT, responses(2), [{"helpful": 1, "harmless": 0}])
    assert all(one["helpful=1,harmless=0"] == pytest.approx(one["helpful"], abs=1e-5) for one in rewards)


def test_the_end_token_counts_exactly_where_it_is_given(base: Path, store: PolicyStore, model: RewardModel) -> None:
    end = 2
    ended, truncated = score(model, "demo:1", PROMPT, [[21, 22, 23, end], [21, 22, 23]])
    assert_close([ended, truncated], rewards_one_by_one(base, store.get("demo:1"), PROMPT, [[21, 22, 23, end], [21, 22, 23]], []))
    assert abs(ended["helpful"] - truncated["helpful"]) > 1e-3


@pytest.mark.slow
def test_each_call_is_scored_by_the_set_it_names_however_many_there_are(base: Path, store: PolicyStore, model: RewardModel) -> None:
    answers = responses(2, seed=3)
    for name in ("demo:1", "demo:2", "demo:3", "demo:1"):
        assert_close(
            score(model, name, PROMPT, answers, SOUPS[:1]), rewards_one_by_one(base, store.get(name), PROMPT, answers, SOUPS[:1])
        )
    assert list(model._resident) == ["demo:3", "demo:1"]


def test_length_normalised_rewards_are_per_token() -> None:
    assert per_token({"helpful": 3.0, "harmless": -1.5}, [5, 6, 2]) == {"helpful": 1.0, "harmless": -0.5}


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_other_architectures_are_scored_as_they_compute_themselves(architecture: str, tmp_path: Path) -> None:
    """Attention windows as long as the context, biases of q, k and v, norms of q and k."""
    torch.manual_seed(1)
    own: dict[str, Any] = {"mistral": {"sliding_window": 128}, "qwen2": {}, "qwen3": {"head_dim": 24}}[architecture]
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        **own,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    store = PolicyStore(tmp_path / "policies")
    targets = dict.fromkeys(OBJECTIVES, ADAPTABLE_MODULES)
    policy_set = publish_random(store, tmp_path / "base", tmp_path, targets, base_sha256="tiny", prompt_format=RAW)
    model = RewardModel.load(tmp_path / "base", store, base_sha256="tiny")
    answers = responses(3, seed=6)
    wanted = rewards_one_by_one(tmp_path / "base", policy_set, PROMPT, answers, SOUPS[:1])
    assert max(abs(value) for rewards in wanted for value in rewards.values()) > 0.5
    assert_close(score(model, "demo:1", PROMPT, answers, SOUPS[:1]), wanted)


def test_wrong_input_is_refused_with_the_field_that_is_wrong(model: RewardModel) -> None:
    for prompt, answer, param in [([], [1], "prompt"), ([1], [], "responses"), ([1], [300], "responses"), ([-1], [1], "prompt")]:
        with pytest.raises(InvalidRequest) as caught:
            score(model, "demo:1", prompt, [[1], answer])
        assert caught.value.param == param
    with pytest.raises(InvalidRequest, match="at most 128"):
        score(model, "demo:1", [1] * 100, [[1] * 29])
    with pytest.raises(NotFound, match="known sets are demo:1"):
        score(model, "demo:9", PROMPT, [[1]])


def test_policies_of_another_base_are_refused(base: Path, store: PolicyStore) -> None:
    other = RewardModel.load(base, store, base_sha256="another")
    with pytest.raises(IncompatiblePolicy, match="another base"):
        score(other, "demo:1", PROMPT, [[1]])


def test_a_base_that_packing_would_compute_wrongly_is_refused(base: Path, store: PolicyStore) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    outputs = plain.forward
    plain.forward = lambda **inputs: _scaled(outputs(**inputs))
    with pytest.raises(InvalidRequest, match="cannot be scored"):
        RewardModel(plain, store, base_sha256="tiny")


class Largest(TorchDispatchMode):
    """Notes the most positions for which a result holds the whole vocabulary."""

    vocabularies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (300,) and result.dtype == torch.float32:
            self.vocabularies = max(self.vocabularies, result.numel() // 300)
        return result


def count_passes(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on the number of models in each pass is written down here."""
    rows: list[int] = []
    log_probs = type(model)._log_probs

    def counted(stacks: Any, coefficients: torch.Tensor, packing: Any) -> torch.Tensor:
        rows.append(len(coefficients))
        return log_probs(model, stacks, coefficients, packing)

    monkeypatch.setattr(model, "_log_probs", counted)
    return rows


def _scaled(outputs: Any) -> Any:
    """What a model with scaled logits does after its head."""
    outputs.logits = outputs.logits / 4
    return outputs


@pytest.mark.slow
def test_rewards_of_the_real_model_agree_with_peft_one_by_one(bundled_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_base)
    chat = PromptFormat.of(tokenizer)
    store = PolicyStore(tmp_path / "policies")
    targets = dict.fromkeys(OBJECTIVES, ADAPTABLE_MODULES)
    policy_set = publish_random(store, bundled_base, tmp_path, targets, base_sha256="real", prompt_format=chat, scale=0.05)
    model = RewardModel.load(bundled_base, store, base_sha256="real")
    prompt = chat.prompt_ids("Why is the sky blue?", tokenizer)
    texts = ["Because air scatters blue light more than red light.", "It is not.", "That is a good question! " * 8]
    answers = [chat.response_ids(text, tokenizer) for text in texts]
    wanted = rewards_one_by_one(bundled_base, policy_set, prompt, answers, SOUPS[:1])
    assert max(abs(value) for rewards in wanted for value in rewards.values()) > 0.5
    assert_close(score(model, "demo:1", prompt, answers, SOUPS[:1]), wanted)
