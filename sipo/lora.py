"""LoRA adapters as plain matrices: read from PEFT's folders, checked, stacked.

The decoder's plugin and the scorer both compute the policies of a set in one pass over the base model. They see the adapters of a
set as one stack: with A_i [r_i, in] and B_i [out, r_i] (B scaled already), the delta of a row x with one coefficient per adapter is

    ((x · A^T) * c) · B^T,   A = [A_1; A_2; …],  B = [B_1, B_2, …],  c = each coefficient repeated r_i times

which is a single policy for c one-hot, an exact soup for c = w (the weighted sum of deltas), and the base for c = 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sipo.adapters import WEIGHTS, AdapterConfig, read_config, read_key, read_tensors
from sipo.errors import IncompatiblePolicy

ADAPTABLE_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers that an adapter may change, by the last part of their name."""


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
    """Reads a PEFT LoRA adapter. Raises IncompatiblePolicy, saying why and what to do, for anything that is not a plain LoRA on
    ADAPTABLE_MODULES."""
    config = read_config(folder)
    halves: dict[str, dict[str, Tensor]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for key, tensor in read_tensors(folder).items():
        found = read_key(folder, key)
        if not found or found.module.rpartition(".")[2] not in ADAPTABLE_MODULES:
            raise IncompatiblePolicy(f"{folder} changes {key}: only {', '.join(ADAPTABLE_MODULES)} can be changed")
        pair = halves.setdefault(found.module, {})
        if found.half in pair:
            raise IncompatiblePolicy(
                f"{folder} has lora_{found.half} of {found.module} twice: save the adapter again, without copies"
            )
        pair[found.half] = tensor.float()
        names[found.module] = found.names
    return LoraAdapter({module: _scaled(folder, config, module, pair, names[module]) for module, pair in halves.items()})


def _scaled(
    folder: Path, config: AdapterConfig, module: str, pair: dict[str, Tensor], names: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """A and the scaled B of one module. Raises IncompatiblePolicy unless both are there, fit together and are finite."""
    for half in "AB":
        if half not in pair:
            raise IncompatiblePolicy(f"{folder} holds no lora_{half} of {module}: save the adapter again, or download it again")
        if not pair[half].isfinite().all():
            raise IncompatiblePolicy(
                f"{folder} has values that are not finite in lora_{half} of {module}: its training overflowed; train it again, "
                "with bfloat16 or a lower learning rate"
            )
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise IncompatiblePolicy(
            f"{folder} has lora_A of shape {list(a.shape)} and lora_B of shape {list(b.shape)} for {module}, which do not fit "
            "together: save the adapter again"
        )
    rank = a.shape[0]
    # PEFT refuses such an adapter too; which of the two ranks its scaling had, nobody can tell.
    if config.rank_of(names) != rank:
        raise IncompatiblePolicy(
            f"{folder} has weights of rank {rank} for {module} where its adapter_config.json (r, rank_pattern) says "
            f"{config.rank_of(names):g}: the two files are not of one adapter; save it again"
        )
    return a, b * config.scaling_of(names, rank)


def copy_weights(source: Path, target: Path) -> None:
    """The weights of an adapter that load_adapter takes, with each tensor under the name that PEFT itself looks for: it passes over
    those under a name that some tool has wrapped. Raises IncompatiblePolicy where the patterns would mean something else then."""
    config, tensors = read_config(source), read_tensors(source)
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = read_key(source, key)
        assert found is not None, "load_adapter has taken it"
        plain[f"base_model.model.{found.module}.lora_{found.half}.weight"] = tensor
        if config.scaling_of(found.names, 1) != config.scaling_of((found.module,), 1):
            raise IncompatiblePolicy(
                f"{source} has an alpha_pattern for {found.names[0]}, which is {found.module} in the base: write the base's name "
                "there"
            )
    if plain.keys() == tensors.keys():
        shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    else:
        save_file(plain, target / WEIGHTS, metadata={"format": "pt"})


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


@torch.no_grad()
def merge(model: nn.Module, adapter: LoraAdapter) -> None:
    """Adds the adapter's deltas to the weights of a plain transformers model, in place.

    Sums are float32 and rounded to the model's dtype once; a model in bfloat16 keeps little of a small delta even so. Raises
    IncompatiblePolicy, with nothing changed, unless the model has every module that the adapter changes, in the same shape.
    """
    linears = dict(model.named_modules())
    for module, (a, b) in adapter.modules.items():
        weight = getattr(linears.get(module), "weight", None)
        if weight is None or list(weight.shape) != [b.shape[0], a.shape[1]]:
            raise IncompatiblePolicy(
                f"the adapter changes {module} of shape {[b.shape[0], a.shape[1]]}, and the model has "
                f"{None if weight is None else list(weight.shape)} there: it was trained on another base model"
            )
    for module, (a, b) in adapter.modules.items():
        weight = model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + (b @ a).to(weight.device))
