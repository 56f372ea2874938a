"""How an engine with the plugin is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sipo.decoding.vllm.batch import RANKS, SLOTS
from sipo.decoding.vllm.kernels import OP_PRIORITY
from sipo.decoding.vllm.model import ARCHITECTURE_PREFIX
from sipo.errors import InvalidRequest
from sipo.precision import torch_dtype

UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its full name: vLLM takes "uni" on a CPU for "mp", one more process that spins on shared memory."""


def engine_arguments(
    model: Path,
    *,
    slots: int,
    dtype: str,
    max_model_len: int | None,
    max_num_seqs: int,
    tensor_parallel: int,
    compiled: bool | None,
    ranks: int,
) -> dict[str, Any]:
    """Arguments for vLLM's EngineArgs.

    `compiled` is torch.compile, and CUDA graphs on a GPU, where it is the default; on a CPU it takes minutes at the start. `ranks`
    are the columns that all resident sets' adapters have together then. Raises InvalidRequest for an architecture that the plugin
    was not made for.
    """
    gpu = torch.cuda.is_available()
    compiled = gpu if compiled is None else compiled
    return {
        "model": str(model),
        "hf_overrides": {"architectures": [served_architecture(model)]},
        "dtype": str(torch_dtype("auto")).removeprefix("torch.") if dtype == "auto" else dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": not compiled,
        # In one piece: vLLM's piecewise graphs are made for one row per token. A CUDA graph holds a whole step of decoding.
        "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "cudagraph_mode": "FULL_DECODE_ONLY"} if compiled else {},
        "ir_op_priority": {} if gpu or compiled else OP_PRIORITY,
        # A seeded request whose prompt is cut into chunks ends vLLM's CPU engine: it rewinds the request's random generator, which
        # only CUDA's can do. Whole prompts need no rewinding.
        "enable_chunked_prefill": gpu,
        # A prefix is shared in whole blocks. vLLM's 128 tokens on a CPU would compute most of a few-shot prompt anew each time.
        "block_size": None if gpu else 32,
        "logits_processors": ["sipo.decoding.vllm.batch:MixtureProcessor"],
        "worker_extension_cls": "sipo.decoding.vllm.worker.PolicyWorker",
        "additional_config": {SLOTS: slots, RANKS: ranks},
        "tensor_parallel_size": tensor_parallel,
        "distributed_executor_backend": UNIPROC if tensor_parallel == 1 else "mp",
    }


def served_architecture(model: Path) -> str:
    """The plugin's architecture for a model. Raises InvalidRequest for one that the plugin was not made for."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    supported = [name for name in ModelRegistry.get_supported_archs() if name.startswith(ARCHITECTURE_PREFIX)]
    if not supported:
        raise RuntimeError("vLLM does not find the plugin sipo: install this project again (pip install -e .)")
    config = json.loads((model / "config.json").read_text())
    [named, *_] = config.get("architectures") or ["model that names no architecture"]
    if ARCHITECTURE_PREFIX + named not in supported:
        known = ", ".join(sorted(name.removeprefix(ARCHITECTURE_PREFIX) for name in supported))
        raise InvalidRequest(f"{model} is a {named}: the decoder mixes {known}", param="model")
    return f"{ARCHITECTURE_PREFIX}{named}"
