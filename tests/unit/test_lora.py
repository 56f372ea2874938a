from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sipo.errors import IncompatiblePolicy
from sipo.lora import LoraAdapter, load_adapter, merge, stack

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))


def saved_adapter(folder: Path, seed: int, **config: object) -> LoraAdapter:
    """An adapter with random A and B, as PEFT writes it."""
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return load_adapter(folder)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_delta_is_the_one_that_peft_merges(tmp_path: Path, use_rslora: bool) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": use_rslora}
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    before = tiny_llama().state_dict()
    merged = model.merge_and_unload().state_dict()
    for module in (Q, DOWN):
        a, b = load_adapter(tmp_path).modules[module]
        torch.testing.assert_close(b @ a, merged[f"{module}.weight"] - before[f"{module}.weight"], atol=1e-5, rtol=1e-5)


def test_a_stack_gives_each_policy_the_soup_and_the_base_by_its_coefficients(tmp_path: Path) -> None:
    first = saved_adapter(tmp_path / "1", 1, r=4, lora_alpha=8, target_modules=["q_proj"])
    second = saved_adapter(tmp_path / "2", 2, r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"])
    x = torch.randn(4, 16)
    coefficients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7], [0.0, 0.0]])
    stacked = stack([first, second], Q)
    assert stacked is not None
    assert stacked.ranks == (4, 2)
    got = ((x @ stacked.a.T) * stacked.expand(coefficients)) @ stacked.b.T

    deltas = [b @ a for a, b in (first.modules[Q], second.modules[Q])]
    for row in range(4):
        delta = sum(c * d for c, d in zip(coefficients[row], deltas, strict=True))
        torch.testing.assert_close(got[row], delta @ x[row], atol=1e-4, rtol=1e-4)


def test_a_module_that_only_one_adapter_changes_has_rank_zero_for_the_other(tmp_path: Path) -> None:
    first = saved_adapter(tmp_path / "1", 1, r=4, target_modules=["q_proj"])
    second = saved_adapter(tmp_path / "2", 2, r=2, target_modules=["down_proj"])
    stacked = stack([first, second], DOWN)
    assert stacked is not None
    assert stacked.ranks == (0, 2)
    assert stacked.expand(torch.tensor([[5.0, 1.0]])).tolist() == [[1.0, 1.0]]
    assert stack([first], DOWN) is None


def test_a_merged_model_is_pefts_and_another_one_is_left_alone(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, 1, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = tiny_llama()
    merge(model, adapter)
    wanted = PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload().state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=1e-5)

    in_half = tiny_llama().bfloat16()
    merge(in_half, adapter)
    assert torch.equal(
        in_half.get_submodule(Q).weight, (tiny_llama().bfloat16().get_submodule(Q).weight.float() + delta(adapter, Q)).bfloat16()
    )

    with pytest.raises(
        IncompatiblePolicy, match="shape \\[16, 24\\], and the model has None there: it was trained on another base"
    ):
        merge(
            other := tiny_llama().model.layers[0],
            LoraAdapter({"self_attn.q_proj": adapter.modules[Q], "down_proj": adapter.modules[DOWN]}),
        )
    assert torch.equal(other.self_attn.q_proj.weight, tiny_llama().get_submodule(Q).weight)


def delta(adapter: LoraAdapter, module: str) -> Tensor:
    a, b = adapter.modules[module]
    return b @ a
