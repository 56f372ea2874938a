"""Soups: policies merged in weight space at w, as one LoRA adapter that any PEFT user can load.

Decoder and scorer never need this: to them a soup is a row of coefficients over the set's adapters (sipo.lora).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from sipo.errors import InvalidRequest
from sipo.lora import LoraAdapter
from sipo.preferences import Weights


def exact_soup(adapters: Mapping[str, LoraAdapter], weights: Weights) -> LoraAdapter:
    """Delta = Σ w_i · B_i A_i: the exact merge of the policies' weights, of any ranks, which add up."""
    modules = {}
    for module in _modules(adapters):
        present = {name: adapter.modules[module] for name, adapter in adapters.items() if module in adapter.modules}
        modules[module] = (
            torch.cat([a for a, _ in present.values()]),
            torch.cat([weights[name] * b for name, (_, b) in present.items()], dim=1),
        )
    return LoraAdapter(modules)


def interpolated_soup(adapters: Mapping[str, LoraAdapter], weights: Weights) -> LoraAdapter:
    """Delta = (Σ w_i B_i)(Σ w_i A_i), as the published code of the paper merges: of one rank, and off by the cross terms, little
    where the policies began with the same A and much where not. Raises InvalidRequest for policies of different ranks or layers."""
    modules = {}
    for module in _modules(adapters):
        pairs = [adapter.modules.get(module) for adapter in adapters.values()]
        if None in pairs or len({pair[0].shape for pair in pairs if pair}) > 1:
            raise InvalidRequest(f"the policies have other ranks or layers ({module}): A and B can only be interpolated one by one")
        a = sum(weights[name] * adapter.modules[module][0] for name, adapter in adapters.items())
        b = sum(weights[name] * adapter.modules[module][1] for name, adapter in adapters.items())
        assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        modules[module] = (a, b)
    return LoraAdapter(modules)


def save_adapter(adapter: LoraAdapter, folder: Path, base_name: str) -> None:
    """As a PEFT adapter with scaling 1; modules of smaller rank are filled up with zeros, since PEFT knows one rank."""
    rank = max(a.shape[0] for a, _ in adapter.modules.values())
    tensors = {}
    for module, (a, b) in adapter.modules.items():
        missing = rank - a.shape[0]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.modules}),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _modules(adapters: Mapping[str, LoraAdapter]) -> list[str]:
    return list(dict.fromkeys(module for adapter in adapters.values() for module in adapter.modules))
