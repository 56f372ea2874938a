"""Implicit rewards: what the packed, stacked pass computes is what plain transformers with PEFT compute one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sipo.errors import IncompatiblePolicy, InvalidRequest, NotFound
from sipo.lora import TARGETS
from sipo.policies import BaseModelRef, Draft, PolicySet, PolicyStore
from sipo.preferences import Weights, format_weights, sampling_weights
from sipo.prompts import PromptFormat
from sipo.rewards import RewardModel

BETA = 0.1
OBJECTIVES = ["helpful", "harmless"]
SOUPS = sampling_weights(OBJECTIVES)
PROMPT = [11, 12, 13, 14, 15]


def make_adapters(base: Path, folder: Path, targets: dict[str, tuple[str, ...]], seed: int = 0) -> dict[str, Path]:
    """Random adapters of different ranks, large enough that the rewards differ clearly."""
    torch.manual_seed(seed)
    paths = {}
    for rank, (objective, modules) in enumerate(targets.items(), start=2):
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(modules), init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        adapted.save_pretrained(folder / objective)
        paths[objective] = folder / objective
    return paths


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
    for version in (1, 2, 3):
        targets = {"helpful": TARGETS, "harmless": ("q_proj", "v_proj", "down_proj")}
        adapters = make_adapters(base, folder / f"trained-{version}", targets, seed=version)
        draft = Draft(
            name="demo",
            base=BaseModelRef(name="tiny", sha256="tiny"),
            prompt_format=PromptFormat(kind="raw", template="{prompt}\n"),
            objectives=OBJECTIVES,
            beta=BETA,
        )
        store.publish(draft, adapters, base, activate=True)
    return store


@pytest.fixture(scope="module")
def model(base: Path, store: PolicyStore) -> RewardModel:
    return RewardModel.load(base, store, base_sha256="tiny")


def responses(count: int, *, longest: int = 20, seed: int = 0) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(300) for _ in range(drawn.randint(1, longest))] for _ in range(count)]


def log_prob(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> float:
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1)[range(len(response)), list(response)].sum())


def by_peft(
    base: Path, policy_set: PolicySet, prompt: Sequence[int], answers: Sequence[Sequence[int]], soups: Sequence[Weights]
) -> list[dict[str, float]]:
    """Every model on its own, every response on its own: PEFT's active adapter, its exact merge for a soup, the plain base."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    reference = [log_prob(plain, prompt, answer) for answer in answers]
    first, *others = policy_set.objectives
    model = PeftModel.from_pretrained(plain, policy_set.adapter_dir(first), adapter_name=first).eval()
    for objective in others:
        model.load_adapter(policy_set.adapter_dir(objective), adapter_name=objective)
    adapters = {objective: objective for objective in policy_set.objectives}
    for index, weights in enumerate(soups):
        model.add_weighted_adapter(list(weights), list(weights.values()), adapter_name=f"soup{index}", combination_type="cat")
        adapters[format_weights(weights)] = f"soup{index}"
    rewards: list[dict[str, float]] = [{} for _ in answers]
    for name, adapter in adapters.items():
        model.set_adapter(adapter)
        for index, answer in enumerate(answers):
            rewards[index][name] = policy_set.manifest.beta * (log_prob(model, prompt, answer) - reference[index])
    return rewards


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]], tolerance: float = 1e-3) -> None:
    assert [list(rewards) for rewards in found] == [list(rewards) for rewards in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


def test_rewards_of_policies_and_soups_agree_with_peft_one_by_one(base: Path, store: PolicyStore, model: RewardModel) -> None:
    answers = responses(6)
    wanted = by_peft(base, store.get("demo:1"), PROMPT, answers, SOUPS)
    assert max(abs(value) for rewards in wanted for value in rewards.values()) > 0.5
    assert_close(model.score("demo:1", PROMPT, answers, SOUPS), wanted)


def test_the_other_responses_in_a_batch_and_its_cut_into_passes_change_no_value(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = responses(9, seed=1)
    together = model.score("demo:1", PROMPT, answers, SOUPS)
    assert_close([model.score("demo:1", PROMPT, [answer], SOUPS)[0] for answer in answers], together)
    assert_close(model.score("demo:1", PROMPT, answers[::-1], SOUPS)[::-1], together)
    for budget in (40, 300):
        monkeypatch.setattr(model, "token_budget", budget)
        assert_close(model.score("demo:1", PROMPT, answers, SOUPS), together)


def test_soups_beside_them_change_no_reward_of_the_policies(model: RewardModel) -> None:
    answers = responses(3, seed=2)
    alone = model.score("demo:1", PROMPT, answers)
    beside = [{name: rewards[name] for name in OBJECTIVES} for rewards in model.score("demo:1", PROMPT, answers, SOUPS)]
    assert_close(alone, beside)


def test_a_one_hot_soup_is_the_policy_itself(model: RewardModel) -> None:
    rewards = model.score("demo:1", PROMPT, responses(2), [{"helpful": 1, "harmless": 0}])
    assert all(one["helpful=1,harmless=0"] == pytest.approx(one["helpful"], abs=1e-5) for one in rewards)


def test_the_end_token_counts_exactly_where_it_is_given(base: Path, store: PolicyStore, model: RewardModel) -> None:
    end = 2
    ended, truncated = model.score("demo:1", PROMPT, [[21, 22, 23, end], [21, 22, 23]])
    assert_close([ended, truncated], by_peft(base, store.get("demo:1"), PROMPT, [[21, 22, 23, end], [21, 22, 23]], []))
    assert abs(ended["helpful"] - truncated["helpful"]) > 1e-3


def test_each_call_is_scored_by_the_set_it_names_however_many_there_are(base: Path, store: PolicyStore, model: RewardModel) -> None:
    answers = responses(2, seed=3)
    for name in ("demo:1", "demo:2", "demo:3", "demo:1"):
        assert_close(model.score(name, PROMPT, answers, SOUPS[:1]), by_peft(base, store.get(name), PROMPT, answers, SOUPS[:1]))
    assert list(model._resident) == ["demo:3", "demo:1"]


def test_wrong_input_is_refused_with_the_field_that_is_wrong(model: RewardModel) -> None:
    for prompt, answer, param in [([], [1], "prompt"), ([1], [], "responses"), ([1], [300], "responses"), ([-1], [1], "prompt")]:
        with pytest.raises(InvalidRequest) as caught:
            model.score("demo:1", prompt, [[1], answer])
        assert caught.value.param == param
    with pytest.raises(InvalidRequest, match="at most 128"):
        model.score("demo:1", [1] * 100, [[1] * 29])
    with pytest.raises(NotFound, match="known sets are demo:1"):
        model.score("demo:9", PROMPT, [[1]])


def test_policies_of_another_base_are_refused(base: Path, store: PolicyStore) -> None:
    other = RewardModel.load(base, store, base_sha256="another")
    with pytest.raises(IncompatiblePolicy, match="another base"):
        other.policy_set("demo:1")


def test_a_base_that_packing_would_compute_wrongly_is_refused(base: Path, store: PolicyStore) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    outputs = plain.forward
    plain.forward = lambda **inputs: _scaled(outputs(**inputs))
    with pytest.raises(InvalidRequest, match="cannot be scored"):
        RewardModel(plain, store, base_sha256="tiny")


def _scaled(outputs: Any) -> Any:
    """What a model with scaled logits does after its head."""
    outputs.logits = outputs.logits / 4
    return outputs
