"""The decoder's settings, from SIPO_… variables."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.common.limits import MixingSettings
from services.common.settings import Port


class DecoderSettings(MixingSettings):
    decoder_port: Port = 8001
    decoder_sets: int = Field(default=2, ge=1, le=16, description="policy sets in memory at rest; others are loaded on demand")
    decoder_max_coefficient: float = Field(default=10, gt=0, description="bound of linear mixing's coefficients, either sign")
    decoder_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is bfloat16 where the processor computes in it"
    )
    decoder_max_num_seqs: int = Field(default=64, ge=1, description="requests in one batch")
    decoder_tool_parser: str | None = Field(
        default=None, description="how the model writes calls of tools: a name of vLLM's --tool-call-parser, such as hermes"
    )
    decoder_tensor_parallel: int = Field(default=1, ge=1, description="devices that share the model's layers")
    decoder_compiled: bool | None = Field(
        default=None, description="torch.compile and CUDA graphs; by default on a GPU only: a CPU takes minutes at the start"
    )
    decoder_ranks: int = Field(
        default=128, ge=1, description="when compiled: the ranks of all adapters in memory together may be so many"
    )
    decoder_threads: int | None = Field(
        default=None, ge=1, description="OpenMP threads of the engine; by default vLLM's choice, which is all cores on a CPU"
    )
    decoder_kv_cache_gib: int = Field(default=2, ge=1, description="memory for keys and values on a CPU")
    decoder_drain_seconds: float = Field(
        default=300, gt=0, description="with decoder_sleeps: how long answers under way may take to end before they are broken off"
    )
    decoder_gpu_memory: float = Field(default=0.45, gt=0, le=1, description="part of the GPU's memory that the engine may take")
