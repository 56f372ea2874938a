"""A pair laid out in one row gives what its two rows give: with TRL's own forward as the measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from sipo.training.shared_prompt import IGNORED, PairLayout, share_prompts

PAD = 0
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def padded(prompt: list[int], *responses: list[int]) -> dict[str, Tensor]:
    """TRL's rows for one pair."""
    width = len(prompt) + max(map(len, responses))
    ids, labels, mask = [], [], []
    for response in responses:
        padding = width - len(prompt) - len(response)
        ids.append([*prompt, *response, *[PAD] * padding])
        labels.append([*[IGNORED] * len(prompt), *response, *[IGNORED] * padding])
        mask.append([1] * (width - padding) + [0] * padding)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def model(base: Path) -> Any:
    """The tiny base with TRL's head and a LoRA that does something."""
    found = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_fused_lm_head(found, outputs=FIELDS)
    torch.manual_seed(0)
    policy = get_peft_model(found, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def tokens_in(policy: Any) -> list[int]:
    """How many tokens each call of the trunk is given, from now on."""
    seen: list[int] = []
    trunk = policy.get_base_model().base_model
    trunk.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return seen


PAIRS = [
    padded([5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]),
    padded([5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [15]),
    padded([5], [9, 10, 11], [12, 13]),
    padded([5, 6], [7, 8, 9], [7, 8, 10]),  # the responses begin alike too
]


@pytest.mark.parametrize("pair", PAIRS)
def test_values_and_gradients_are_those_of_two_rows(tiny_base: Path, pair: dict[str, Tensor]) -> None:
    plain, shared = model(tiny_base), model(tiny_base)
    share_prompts(shared.get_base_model())
    seen = tokens_in(shared)
    weights = torch.randn(pair["labels"][:, 1:].shape, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, policy in {"plain": plain, "shared": shared}.items():
        found[name] = policy(**pair, fused_lm_head=True)
        (found[name].log_probs * weights).sum().backward()
    for field in FIELDS:
        torch.testing.assert_close(found["shared"][field], found["plain"][field], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["shared"].label_mask, found["plain"].label_mask)
    gradients = [{n: p.grad for n, p in policy.named_parameters() if p.requires_grad} for policy in (plain, shared)]
    assert gradients[0] and all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    responses = int((pair["labels"] != IGNORED).sum())
    prompt = int((pair["labels"][0] != IGNORED).int().argmax())
    assert seen == [prompt - 1 + responses]


def test_only_one_pair_with_one_prompt_is_shared(tiny_base: Path) -> None:
    policy = model(tiny_base)
    share_prompts(policy.get_base_model())
    seen = tokens_in(policy)
    pair = PAIRS[0]
    policy(**{name: rows.repeat(2, 1) for name, rows in pair.items()}, fused_lm_head=True)
    other = pair["input_ids"].clone()
    other[1, 0] = 17
    policy(**pair | {"input_ids": other}, fused_lm_head=True)
    policy(**pair)  # without TRL's head
    size = pair["input_ids"].numel()
    assert seen == [2 * size, size, size]
    assert PairLayout.of(pair["input_ids"][:1], pair["labels"][:1]) is None


def test_attention_with_a_window_is_left_as_it_is(tiny_base: Path) -> None:
    policy = model(tiny_base)
    policy.get_base_model().config.sliding_window = 4
    before = policy.get_base_model().forward
    share_prompts(policy.get_base_model())
    assert policy.get_base_model().forward == before
