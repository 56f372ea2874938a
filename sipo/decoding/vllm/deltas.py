"""LoRA deltas on vLLM's linear layers: each row's own weighted sum of a set's adapters, added to what the base computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from sipo.decoding.vllm.batch import RANKS, SLOTS, MixtureBatch
from sipo.decoding.vllm.residents import Delta, FixedResidents, ResidentSet
from sipo.errors import IncompatiblePolicy
from sipo.lora import LoraAdapter, stack

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""vLLM's linear layers by the last part of their name, and the checkpoint's layers that each holds, in the order of its output."""


class DeltaMethod(QuantizeMethodBase):  # type: ignore[misc]
    """A linear layer's own method of multiplication, and the deltas of the sets in use.

    It stands between the product and what tensor parallelism does with it, so a rank's part of a delta is summed with its part of
    the base's product.
    """

    def __init__(self, inner: QuantizeMethodBase, name: str, batch: MixtureBatch) -> None:
        self.inner = inner
        self.name = name
        self.batch = batch

    def create_weights(self, layer: nn.Module, *args: Any, **options: Any) -> None:
        self.inner.create_weights(layer, *args, **options)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = self.inner.apply(layer, x, bias)
        for chosen, coefficients in self.batch.active:
            if delta := chosen.deltas.get(self.name):
                delta.add(output, x, coefficients)
        return output


def fixed_residents(linears: Mapping[str, nn.Module], config: VllmConfig) -> FixedResidents:
    """Room for the sets beside this rank's linear layers."""
    shapes = {
        name: (_local_inputs(linear), _local_outputs(linear), len(FUSED[name.rpartition(".")[2]]))
        for name, linear in linears.items()
    }
    rows = config.scheduler_config.max_num_batched_tokens * config.additional_config[SLOTS]
    return FixedResidents(config.device_config.device, config.model_config.dtype, shapes, config.additional_config[RANKS], rows)


def resident_set(linears: dict[str, nn.Module], policies: Sequence[LoraAdapter], reference: LoraAdapter | None) -> ResidentSet:
    """The adapters stacked for this rank's linear layers, the reference's last. Raises IncompatiblePolicy for one that does not fit
    the base."""
    adapters = [*policies, *([] if reference is None else [reference])]
    ranks = tuple(max(a.shape[0] for a, _ in adapter.modules.values()) for adapter in adapters)
    deltas: dict[str, Delta] = {}
    used: set[str] = set()
    for name, linear in linears.items():
        parent, _, fused = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED[fused]]
        used.update(parts)
        if any(part in adapter.modules for adapter in adapters for part in parts):
            deltas[name] = _fused_delta(adapters, ranks, parts, linear)
    for adapter in adapters:
        if foreign := sorted(adapter.modules.keys() - used):
            raise IncompatiblePolicy(f"the adapter changes {foreign[0]}, which this base model does not have")
    return ResidentSet(ranks, deltas, has_reference=reference is not None)


def _fused_delta(adapters: Sequence[LoraAdapter], ranks: tuple[int, ...], parts: list[str], linear: Any) -> Delta:
    """This rank's part: its columns of `a` where the input is split over ranks, its columns of `b` where the output is."""
    inputs, local_inputs = linear.input_size, _local_inputs(linear)
    tensor_a: list[Tensor] = []
    tensor_b: list[Tensor] = []
    for i, (part, local_outputs) in enumerate(zip(parts, linear.output_partition_sizes, strict=True)):
        # Where there are more ranks than key-value heads, several ranks hold the same head.
        copies = getattr(linear, "num_kv_head_replicas", 1) if i > 0 else 1
        ways = 1 if _splits_input(linear) else linear.tp_size // copies
        padded = [_padded(adapter, part, rank, inputs, local_outputs * ways) for adapter, rank in zip(adapters, ranks, strict=True)]
        stacked = stack(padded, part)
        assert stacked is not None
        first_output = linear.tp_rank // copies * local_outputs if ways > 1 else 0
        first_input = linear.tp_rank * local_inputs if local_inputs < inputs else 0
        tensor_a.append(stacked.a[:, first_input : first_input + local_inputs])
        tensor_b.append(stacked.b[first_output : first_output + local_outputs])
    weight = next(linear.parameters())
    diagonal: Tensor = torch.block_diag(*tensor_b)  # type: ignore[no-untyped-call]
    return Delta(
        a=torch.cat(tensor_a).to(weight.device, linear.params_dtype),
        b=diagonal.T.contiguous().to(weight.device, linear.params_dtype),
        parts=len(parts),
    )


def _splits_input(linear: nn.Module) -> bool:
    return isinstance(linear, RowParallelLinear)


def _local_inputs(linear: Any) -> int:
    inputs: int = linear.input_size_per_partition if _splits_input(linear) else linear.input_size
    return inputs


def _local_outputs(linear: Any) -> int:
    return sum(linear.output_partition_sizes)


def _padded(adapter: LoraAdapter, module: str, rank: int, inputs: int, outputs: int) -> LoraAdapter:
    """The adapter with exactly `rank` columns for one module, so that one row of coefficients fits every layer."""
    a, b = adapter.modules.get(module, (torch.zeros(0, inputs), torch.zeros(outputs, 0)))
    if a.shape[1] != inputs or b.shape[0] != outputs:
        raise IncompatiblePolicy(
            f"the adapter's {module} goes from {a.shape[1]} to {b.shape[0]} features, this base model's from {inputs} to {outputs}"
        )
    missing = rank - a.shape[0]
    pad = nn.functional.pad
    return LoraAdapter({module: (pad(a, (0, 0, 0, missing)), pad(b, (0, missing)))})
