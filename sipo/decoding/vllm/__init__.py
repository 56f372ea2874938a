"""Multi-objective decoding inside vLLM: the only part of the project that imports it.

One request stays one engine request. Inside the model every token becomes `slots` rows, one per entry of the request's Mixture, so
scheduling, paging, prefix caching, sampling and streaming remain vLLM's, and requests of any sets, modes and weights share a batch.

batch      what the running requests ask for, row by row (vLLM's logits-processor hook)
residents  the resident policy sets, and each row's coefficients for them
deltas     the adapters of a set on vLLM's linear layers
model      the architectures with rows per slot and wide attention
kernels    faster RMS norms on a CPU
worker     loading and unloading policy sets in a running engine
engine     how an engine is started
offline    the engine on a list of prompts, without any service
server     vLLM's OpenAI server as an ASGI app

`register` is the entry point of vLLM's general plugins: vLLM calls it in each of its processes.
"""

from __future__ import annotations

import os
import tempfile

from sipo.errors import InvalidRequest

SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have."""
SOCKET_NAME = 36
"""Bytes of the name that vLLM gives one: a UUID."""


def register() -> None:
    from sipo.decoding.vllm.kernels import register_kernels
    from sipo.decoding.vllm.model import register_architectures

    register_architectures()
    register_kernels()


def set_environment(*, kv_cache_gib: int, threads: int | None) -> None:
    """vLLM reads these variables when it is imported or starts processes, so this comes first. What the operator has set stays."""
    defaults = {
        "VLLM_PLUGINS": "sipo",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other runner has another logits-processor interface
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if "VLLM_RPC_BASE_PATH" not in os.environ:
        defaults["VLLM_RPC_BASE_PATH"] = _folder_for_sockets()
    if threads is not None:
        defaults["OMP_NUM_THREADS"] = str(threads)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _folder_for_sockets() -> str:
    """Where the engine's processes meet: the temporary folder, or another one if its name is too long (a cluster's TMPDIR, say).
    Raises InvalidRequest if there is none."""
    usual = tempfile.gettempdir()
    for folder in (usual, "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) + 1 + SOCKET_NAME <= SOCKET_PATH and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise InvalidRequest(
        f"TMPDIR={usual} is too long for the decoder's sockets: set TMPDIR, or VLLM_RPC_BASE_PATH, to a shorter folder"
    )
