from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sipo.errors import InvalidRequest
from sipo.lora import LoraAdapter, load_adapter
from sipo.soups import exact_soup, interpolated_soup, save_adapter

WEIGHTS = {"a": 0.3, "b": 0.7}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))


def adapters(folder: Path, *configs: dict[str, object]) -> dict[str, LoraAdapter]:
    """Random ones, as PEFT writes them."""
    found = {}
    for seed, (name, config) in enumerate(zip(WEIGHTS, configs, strict=True), start=1):
        model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
        found[name] = load_adapter(folder / name)
    return found


def logits(adapter: Path, name: str | None = None) -> torch.Tensor:
    model = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[1, 2, 3, 4]])).logits
    return found


def test_the_exact_soup_is_the_weighted_sum_of_deltas_and_what_peft_merges_by_cat(tmp_path: Path) -> None:
    found = adapters(
        tmp_path,
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    )
    soup = exact_soup(found, WEIGHTS)
    for module, (a, b) in soup.modules.items():
        halves = {name: one.modules[module] for name, one in found.items() if module in one.modules}
        parts = [WEIGHTS[name] * b_ @ a_ for name, (a_, b_) in halves.items()]
        torch.testing.assert_close(b @ a, sum(parts))
    save_adapter(soup, tmp_path / "soup", "tiny")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS.values()), "both", combination_type="cat")
    model.set_adapter("both")
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([[1, 2, 3, 4]])).logits
    torch.testing.assert_close(logits(tmp_path / "soup"), theirs, atol=1e-4, rtol=1e-4)
    for module, (a, b) in load_adapter(tmp_path / "soup").modules.items():
        torch.testing.assert_close(b @ a, soup.modules[module][1] @ soup.modules[module][0])


def test_the_published_codes_soup_interpolates_a_and_b_apart_and_is_another(tmp_path: Path) -> None:
    same = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    found = adapters(tmp_path, same, same)
    soup, exact = interpolated_soup(found, WEIGHTS), exact_soup(found, WEIGHTS)
    for module, (a, b) in soup.modules.items():
        (a1, b1), (a2, b2) = (one.modules[module] for one in found.values())
        torch.testing.assert_close(b @ a, (0.3 * b1 + 0.7 * b2) @ (0.3 * a1 + 0.7 * a2))
        assert not torch.allclose(b @ a, exact.modules[module][1] @ exact.modules[module][0], atol=1e-3)
    with pytest.raises(InvalidRequest, match="other ranks or layers"):
        interpolated_soup(adapters(tmp_path / "other", same, same | {"r": 2}), WEIGHTS)
