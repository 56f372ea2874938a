"""The adapters of a training: the reference's, which lies beneath the one that is trained, and how that one is saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.nn.functional as F  # noqa: N812
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from sipo.errors import IncompatiblePolicy
from sipo.lora import LoraAdapter


def lay_beneath(model: nn.Module, adapter: LoraAdapter) -> None:
    """From now on a plain transformers model computes with the adapter's deltas, frozen: as base + reference, on which PEFT lays
    the adapter that is trained, and which is what remains where that one is disabled.

    They are not merged: of a small delta that is rounded into weights in bfloat16 more than half may be lost (of the bundled
    policies' 58 % by norm), and scorer and decoder have it whole. Raises IncompatiblePolicy for an adapter of another base.
    """
    linears = dict(model.named_modules())
    for module, (a, b) in adapter.modules.items():
        linear = linears.get(module)
        if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != (b.shape[0], a.shape[1]):
            raise IncompatiblePolicy(
                f"the reference's adapter changes {module}, which is not there in this shape: take the base's own"
            )
        # Buffers go with the model to a device, and into no checkpoint.
        linear.register_buffer("reference_a", a.to(linear.weight.dtype), persistent=False)
        linear.register_buffer("reference_b", b.to(linear.weight.dtype), persistent=False)
        linear.register_forward_hook(_with_reference)


def _with_reference(linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + F.linear(F.linear(inputs[0], linear.reference_a), linear.reference_b)


def save_trained(trainer: Any, target: Path, base_name: str) -> None:
    """Only the trained adapter: not a reference's, and not the place where this machine keeps the base. `trainer`: one of
    transformers with a PEFT model. For every process to call: where they share the weights, they gather them."""
    trainer.model.peft_config["default"].base_model_name_or_path = base_name
    aside = Path(trainer.args.output_dir) / "adapter"  # transformers adds a tokenizer and its own arguments
    trainer.save_model(str(aside))
    if trainer.is_world_process_zero():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            (aside / name).rename(target / name)
