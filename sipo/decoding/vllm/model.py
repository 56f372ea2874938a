"""vLLM's models with several rows per token: one class made from each architecture's ForCausalLM by the same mixin.

Rows are token-major (t0s0, t0s1, t1s0 …), so q of shape [T·S, heads·dim] IS [T, S·heads·dim]: policies are heads. One attention
call over S times the heads computes all slots of a request, each with its own keys and values in one KV cache. Everything else in
the model works row by row and is not changed, but for the LoRA deltas (deltas.py) of its linear layers.
"""

from __future__ import annotations

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

from sipo.decoding.mixing import mix, mix_hidden_states
from sipo.decoding.vllm.batch import batch_of
from sipo.decoding.vllm.deltas import FUSED, DeltaMethod, fixed_residents, resident_set
from sipo.lora import LoraAdapter

ARCHITECTURE_PREFIX = "Sipo"
"""Our class for the architecture "LlamaForCausalLM" is registered as "SipoLlamaForCausalLM"."""


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
        # The detour through a custom operator is for the compiler, and costs a CPU a fortieth of a step.
        self.use_direct_call |= config.compilation_config.mode == CompilationMode.NONE
        self.slots = slots

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = len(query) // self.slots
        wide: Tensor = super().forward(*(rows.reshape(tokens, -1) for rows in (query, key, value)))
        return wide.view(len(query), -1)


class MixingModel(nn.Module):
    """The mixin: placed before an architecture's ForCausalLM, it mixes the slots of each request."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("the decoder's plugin keeps all layers on each rank: set the pipeline parallel size to 1")
        if vllm_config.speculative_config is not None:
            raise ValueError("a draft model proposes for one policy, not for a mixture: leave out speculative decoding")
        mode = vllm_config.compilation_config.mode
        if mode not in (CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE):
            raise ValueError(
                "the decoder's plugin has more rows than vLLM's piecewise graphs: compile in one piece, mode 2, or not at all"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.mixture_batch = batch_of(vllm_config)
        self.linears: dict[str, nn.Module] = {}
        for name, module in list(self.named_modules()):
            if isinstance(module, Attention):
                parent, _, last = name.rpartition(".")
                setattr(self.get_submodule(parent), last, WideAttention(module, self.mixture_batch.slots, vllm_config))
            elif name.rpartition(".")[2] in FUSED:
                self.linears[name] = module
                module.quant_method = DeltaMethod(module.quant_method, name, self.mixture_batch)
        if mode != CompilationMode.NONE:
            self.mixture_batch.residents = fixed_residents(self.linears, vllm_config)

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
        """[rows, vocabulary]. One unembedding for the rules that are linear in the logits; the others need one per slot."""
        rows = len(hidden_states)
        slots = hidden_states.view(rows, self.mixture_batch.slots, -1)
        weights = self.mixture_batch.weights(rows)
        logits = self._unembed(mix_hidden_states(slots, weights))
        for (rule, alpha), members in self.mixture_batch.by_rule().items():
            each = self._unembed(slots[members].flatten(0, 1))
            if logits is not None and each is not None:
                log_probs = torch.log_softmax(each.float(), dim=-1).view(len(members), self.mixture_batch.slots, -1)
                logits[members] = mix(rule, log_probs, weights[members], alpha).to(logits.dtype)
        return logits

    def _unembed(self, hidden_states: Tensor) -> Tensor | None:
        """None on ranks that do not sample."""
        logits: Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]  # of the class that this is mixed into
        return logits

    def load(self, key: str, policies: list[LoraAdapter], reference: LoraAdapter | None) -> None:
        """Makes a set resident. Raises IncompatiblePolicy for adapters that do not fit the base, or find no room."""
        self.mixture_batch.residents.add(key, resident_set(self.linears, policies, reference))

    def unload(self, key: str) -> None:
        self.mixture_batch.residents.remove(key)


def _query_start() -> Tensor | None:
    """The boundaries of the requests' tokens in this forward pass; None in vLLM's trial runs."""
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return None
    query_start: Tensor = next(iter(metadata.values())).query_start_loc
    return query_start


def mixing_architecture(base: type[nn.Module]) -> type[nn.Module]:
    return type(ARCHITECTURE_PREFIX + base.__name__, (MixingModel, base), {})


def register_architectures() -> None:
    for base in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM):
        ModelRegistry.register_model(ARCHITECTURE_PREFIX + base.__name__, mixing_architecture(base))
