"""Whether the decoder can run so on this model and machine. vLLM finds most of it out too, in the middle of its start and in the
names of its own options; here it is said before, in ours."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.decoder.settings import DecoderSettings
from sipo.errors import InvalidRequest
from sipo.precision import torch_dtype
from sipo.resources import gib, parameters, physical_memory
from sipo.words import counted

SCALED_BEFORE = ("default", "su", "longrope", "llama3", "yarn")
"""Kinds of rotary embeddings whose factor is in max_position_embeddings already, or is none."""


@dataclass(frozen=True)
class Shape:
    """What of a model's config.json the limits depend on."""

    context: int | None
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int | None

    @classmethod
    def read(cls, model: Path) -> Shape:
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            context=_context(config),
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config.get("intermediate_size"),
        )


def settle(settings: DecoderSettings, model: Path) -> DecoderSettings:
    """The settings with no more than the model's own context, where none was asked for. Raises InvalidRequest, naming the variable,
    for what cannot work."""
    shape = Shape.read(model)
    settings = _settle_context(settings, shape)
    _check_tensor_parallel(settings, shape)
    _check_memory(settings, shape, model)
    return settings


def _settle_context(settings: DecoderSettings, shape: Shape) -> DecoderSettings:
    wanted = settings.decoder_max_model_len
    if shape.context is None or wanted <= shape.context or "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in os.environ:
        return settings
    if "decoder_max_model_len" not in settings.model_fields_set:
        return settings.model_copy(update={"decoder_max_model_len": shape.context})
    raise InvalidRequest(
        f"SIPO_DECODER_MAX_MODEL_LEN={wanted} is more than the model's own context: it must be {shape.context} tokens or less"
    )


def _check_tensor_parallel(settings: DecoderSettings, shape: Shape) -> None:
    import torch

    ranks, devices = settings.decoder_tensor_parallel, torch.cuda.device_count()
    given = f"SIPO_DECODER_TENSOR_PARALLEL={ranks}"
    if torch.cuda.is_available() and ranks > devices:
        raise InvalidRequest(f"{given} is more than the {counted(devices, 'GPU')} of this machine: take {devices} or less")
    for count, what in ((shape.heads, "attention heads"), (shape.intermediate, "columns of an MLP")):
        if count is not None and count % ranks:
            raise InvalidRequest(f"{given} does not divide the model's {count} {what}: take a number that does, or 1")
    if max(shape.kv_heads, ranks) % min(shape.kv_heads, ranks):
        raise InvalidRequest(
            f"{given} neither divides the model's {counted(shape.kv_heads, 'key-value head')} nor is a multiple of them: take a "
            "number that does or is, or 1"
        )


def _check_memory(settings: DecoderSettings, shape: Shape, model: Path) -> None:
    """On a CPU: of a GPU's memory vLLM takes what SIPO_DECODER_GPU_MEMORY leaves."""
    import torch

    space = settings.decoder_kv_cache_gib
    if torch.cuda.is_available() or os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(space)) != str(space):
        return
    given = f"SIPO_DECODER_KV_CACHE_GIB={space}"
    dtype = torch_dtype("auto") if settings.decoder_dtype == "auto" else getattr(torch, settings.decoder_dtype)
    ranks = settings.decoder_tensor_parallel
    weights, memory = parameters(model) * dtype.itemsize, physical_memory()
    if space * 2**30 * ranks + weights > memory:
        each = f" for each of {ranks} ranks" if ranks > 1 else ""
        raise InvalidRequest(
            f"{given}{each} and {gib(weights)} of weights are more than this machine's memory of {gib(memory)}: take less, or a "
            "smaller model"
        )
    slots, length = settings.decoder_slots, settings.decoder_max_model_len
    kv_heads = max(1, shape.kv_heads // ranks)
    longest = 2 * shape.layers * kv_heads * shape.head_size * dtype.itemsize * slots * length
    if longest > space * 2**30:
        raise InvalidRequest(
            f"{given} has no room for one request of SIPO_DECODER_MAX_MODEL_LEN={length} tokens in SIPO_DECODER_SLOTS={slots}, "
            f"which needs {gib(longest)}: take more of the first, or less of the others"
        )


def _context(config: dict[str, Any]) -> int | None:
    context = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if context is None or (rope.get("rope_type") or rope.get("type") or "default") in SCALED_BEFORE:
        return context
    return int(context * (rope.get("factor") or 1))
