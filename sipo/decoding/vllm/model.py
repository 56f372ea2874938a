"""vLLM's models with several rows per token: one class made from each architecture's ForCausalLM by the same mixin.

Rows are token-major (t0s0, t0s1, t1s0 …), so q of shape [T·S, heads·dim] IS [T, S·heads·dim]: policies are heads. One attention
call over S times the heads computes all slots of a request, each with its own keys and values in one KV cache. Everything else in
the model works row by row and is not changed; LoRA deltas are added to the outputs of the linear layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.sequence import IntermediateTensors

from sipo.decoding.mixing import mix_hidden_states
from sipo.decoding.vllm.batch import Delta, MixtureBatch, ResidentSet, batch_of
from sipo.errors import IncompatiblePolicy
from sipo.lora import LoraAdapter, stack

PREFIX = "Sipo"
"""Our class for the architecture "LlamaForCausalLM" is registered as "SipoLlamaForCausalLM"."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""vLLM's linear layers by the last part of their name, and the checkpoint's layers that each holds, in the order of its output."""


class WideAttention(Attention):  # type: ignore[misc]
    """Attention over [T·S, heads·dim] rows as [T, S·heads·dim]: made from the narrow one that it replaces."""

    def __init__(self, narrow: Attention, slots: int, config: VllmConfig) -> None:
        if narrow.has_sink or getattr(narrow.impl, "alibi_slopes", None) is not None:
            raise ValueError(f"{narrow.layer_name} has attention sinks or ALiBi, which mixing does not support")
        # The narrow layer must leave the table in which vLLM finds attention layers by name: the wide one takes its place.
        del config.compilation_config.static_forward_context[narrow.layer_name]
        super().__init__(
            narrow.num_heads * slots,
            narrow.head_size,
            narrow.impl.scale,
            num_kv_heads=narrow.num_kv_heads * slots,
            cache_config=config.cache_config,
            quant_config=narrow.quant_config,
            logits_soft_cap=narrow.impl.logits_soft_cap or None,
            per_layer_sliding_window=narrow.sliding_window,
            prefix=narrow.layer_name,
            attn_type=narrow.attn_type,
        )
        self.slots = slots

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = len(query) // self.slots
        wide: Tensor = super().forward(*(rows.reshape(tokens, -1) for rows in (query, key, value)))
        return wide.view(len(query), -1)


class MixingModel(nn.Module):
    """The mixin: placed before an architecture's ForCausalLM, it mixes the slots of each request."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
            raise ValueError("the decoder's plugin runs on one device: set tensor and pipeline parallel size to 1")
        if vllm_config.compilation_config.mode != CompilationMode.NONE:
            raise ValueError("the decoder's plugin is not made for compiled graphs: set enforce_eager")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.mixture_batch = batch_of(vllm_config)
        self.linears: dict[str, nn.Module] = {}
        for name, module in list(self.named_modules()):
            if isinstance(module, Attention):
                parent, _, last = name.rpartition(".")
                setattr(self.get_submodule(parent), last, WideAttention(module, self.mixture_batch.slots, vllm_config))
            elif name.rpartition(".")[2] in FUSED:
                self.linears[name] = module
                module.register_forward_hook(_AddDelta(name, self.mixture_batch))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """[T, slots · hidden]: rows of the engine stay tokens, whatever the number of slots."""
        assert input_ids is not None and inputs_embeds is None
        slots = self.mixture_batch.slots
        tokens = len(input_ids)
        self.mixture_batch.start(_query_start(), tokens)
        hidden: Tensor = super().forward(
            input_ids.repeat_interleave(slots), positions.repeat_interleave(slots), intermediate_tensors
        )
        return hidden.view(tokens, -1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        rows = len(hidden_states)
        slots = hidden_states.view(rows, self.mixture_batch.slots, -1)
        mixed = mix_hidden_states(slots, self.mixture_batch.weights(rows))
        logits: Tensor | None = super().compute_logits(mixed)  # type: ignore[misc]  # of the class that this is mixed into
        return logits

    def resident_set(self, adapters: list[LoraAdapter]) -> ResidentSet:
        """The adapters stacked for this model's layers. Raises IncompatiblePolicy for one that does not fit the base."""
        ranks = tuple(max(a.shape[0] for a, _ in adapter.modules.values()) for adapter in adapters)
        deltas: dict[str, Delta] = {}
        used: set[str] = set()
        for name, linear in self.linears.items():
            parent, _, fused = name.rpartition(".")
            parts = [f"{parent}.{part}" for part in FUSED[fused]]
            used.update(parts)
            if any(part in adapter.modules for adapter in adapters for part in parts):
                deltas[name] = _fused_delta(adapters, ranks, parts, linear)
        for adapter in adapters:
            if foreign := sorted(adapter.modules.keys() - used):
                raise IncompatiblePolicy(f"the adapter changes {foreign[0]}, which this base model does not have")
        return ResidentSet(ranks, deltas)


class _AddDelta:
    """A forward hook: adds the deltas of the sets in use to a linear layer's output."""

    def __init__(self, name: str, batch: MixtureBatch) -> None:
        self.name = name
        self.batch = batch

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        result, bias = output
        for chosen, coefficients in self.batch.active:
            if delta := chosen.deltas.get(self.name):
                inner = nn.functional.linear(inputs[0], delta.a)
                parts = inner.shape[1] // coefficients.shape[1]
                inner *= coefficients.repeat(1, parts) if parts > 1 else coefficients
                result = result + nn.functional.linear(inner, delta.b)
        return result, bias


def _fused_delta(adapters: list[LoraAdapter], ranks: tuple[int, ...], parts: list[str], linear: Any) -> Delta:
    sizes: list[int] = getattr(linear, "output_sizes", None) or [linear.output_size]
    inputs: int = linear.input_size
    weight = next(linear.parameters())
    a: list[Tensor] = []
    b: list[Tensor] = []
    for part, outputs in zip(parts, sizes, strict=True):
        padded = [_padded(adapter, part, rank, inputs, outputs) for adapter, rank in zip(adapters, ranks, strict=True)]
        stacked = stack(padded, part)
        assert stacked is not None
        a.append(stacked.a)
        b.append(stacked.b)
    diagonal: Tensor = torch.block_diag(*b)  # type: ignore[no-untyped-call]
    return Delta(a=torch.cat(a).to(weight.device, weight.dtype), b=diagonal.to(weight.device, weight.dtype))


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


def _query_start() -> Tensor | None:
    """The boundaries of the requests' tokens in this forward pass; None in vLLM's trial runs."""
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return None
    query_start: Tensor = next(iter(metadata.values())).query_start_loc
    return query_start


def mixing_architecture(base: type[nn.Module]) -> type[nn.Module]:
    return type(PREFIX + base.__name__, (MixingModel, base), {})


def register_architectures() -> None:
    for base in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM):
        ModelRegistry.register_model(PREFIX + base.__name__, mixing_architecture(base))
