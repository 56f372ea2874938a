"""LoRA adapters as plain matrices: read from PEFT's folders, checked, stacked.

The decoder's plugin and the scorer both compute the policies of a set in one pass over the base model. They see the adapters of a
set as one stack: with A_i [r_i, in] and B_i [out, r_i] (B scaled already), the delta of a row x with one coefficient per adapter is

    ((x · A^T) * c) · B^T,   A = [A_1; A_2; …],  B = [B_1, B_2, …],  c = each coefficient repeated r_i times

which is a single policy for c one-hot, an exact soup for c = w (the weighted sum of deltas), and the base for c = 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sipo.errors import IncompatiblePolicy

ADAPTABLE_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers that an adapter may change, by the last part of their name."""

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True)
class LoraAdapter:
    """One policy's change of the base. `modules` maps a module name ("model.layers.0.self_attn.q_proj") to (A [r, in], B [out, r]);
    both float32, B multiplied by the adapter's scaling, so the module's delta weight is B @ A."""

    modules: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StackedLora:
    """The adapters of one set for one module: `a` [R, in], `b` [out, R], `ranks` per adapter (0 where one has no delta here)."""

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]

    def expand(self, coefficients: Tensor) -> Tensor:
        """[rows, adapters] coefficients to [rows, R], one for each column of the stack."""
        return coefficients.repeat_interleave(torch.tensor(self.ranks, device=coefficients.device), dim=1)


def load_adapter(folder: Path) -> LoraAdapter:
    """Reads a PEFT LoRA adapter. Raises IncompatiblePolicy, saying why, for anything that is not a plain LoRA on
    ADAPTABLE_MODULES."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise IncompatiblePolicy(f"{folder} is no PEFT adapter: {error}") from error
    if config.get("peft_type") != "LORA":
        raise IncompatiblePolicy(f"{folder} is a {config.get('peft_type')} adapter: only LORA can be mixed")
    for option in ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"):
        if config.get(option):
            raise IncompatiblePolicy(f"{folder} sets {option}: only a plain LoRA can be mixed; train it again without")
    if config.get("bias", "none") != "none":
        raise IncompatiblePolicy(f"{folder} trains biases (bias={config['bias']!r}): train it again with bias='none'")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise IncompatiblePolicy(f"{folder} sets rank_pattern or alpha_pattern: one rank and one alpha per adapter, please")

    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or match["module"].rpartition(".")[2] not in ADAPTABLE_MODULES:
            raise IncompatiblePolicy(f"{folder} changes {key}: only {', '.join(ADAPTABLE_MODULES)} can be changed")
        if match["half"] == "A":
            b = tensors[key.replace("lora_A", "lora_B")]
            modules[match["module"]] = (tensor.float(), b.float() * scaling)
    return LoraAdapter(modules)


def check_base(adapter: LoraAdapter, base: Path) -> None:
    """Raises IncompatiblePolicy unless every module that the adapter changes is in the base's weight files, in the same shape."""
    shapes: dict[str, list[int]] = {}
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    for module, (a, b) in adapter.modules.items():
        wanted = [b.shape[0], a.shape[1]]
        if shapes.get(f"{module}.weight") != wanted:
            raise IncompatiblePolicy(
                f"the adapter changes {module} of shape {wanted}, the base {base.name} has {shapes.get(f'{module}.weight')} there: "
                "it was trained on another base model"
            )


def stack(adapters: Sequence[LoraAdapter], module: str) -> StackedLora | None:
    """The adapters' matrices for one module side by side, or None where none of them changes it."""
    present = [adapter.modules.get(module) for adapter in adapters]
    if not any(present):
        return None
    return StackedLora(
        a=torch.cat([pair[0] for pair in present if pair]),
        b=torch.cat([pair[1] for pair in present if pair], dim=1),
        ranks=tuple(pair[0].shape[0] if pair else 0 for pair in present),
    )
