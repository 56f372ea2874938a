"""How an engine with the plugin is started, and the same engine offline, on a list of prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sipo.decoding.request import EXTRA_ARG, Mixture
from sipo.decoding.vllm.batch import SLOTS
from sipo.decoding.vllm.model import PREFIX
from sipo.errors import IncompatiblePolicy, InvalidRequest

UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its full name: vLLM takes "uni" on a CPU for "mp", one more process that spins on shared memory."""


def engine_arguments(
    model: Path, *, slots: int, dtype: str, max_model_len: int | None, max_num_seqs: int, tensor_parallel: int = 1
) -> dict[str, Any]:
    """Arguments for vLLM's EngineArgs. Raises InvalidRequest for an architecture that the plugin was not made for."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = json.loads((model / "config.json").read_text())
    architecture = PREFIX + config["architectures"][0]
    supported = [name for name in ModelRegistry.get_supported_archs() if name.startswith(PREFIX)]
    if not supported:
        raise RuntimeError("vLLM does not find the plugin sipo: install this project again (pip install -e .)")
    if architecture not in supported:
        known = ", ".join(sorted(name.removeprefix(PREFIX) for name in supported))
        raise InvalidRequest(f"{model} is a {config['architectures'][0]}: the decoder mixes {known}", param="model")
    return {
        "model": str(model),
        "hf_overrides": {"architectures": [architecture]},
        "dtype": dtype if dtype != "auto" else _natural_dtype(),
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": True,
        # A seeded request whose prompt is cut into chunks ends vLLM's CPU engine: it rewinds the request's random generator, which
        # only CUDA's can do. Whole prompts need no rewinding.
        "enable_chunked_prefill": torch.cuda.is_available(),
        # A prefix is shared in whole blocks. vLLM's 128 tokens on a CPU would compute most of a few-shot prompt anew each time.
        "block_size": None if torch.cuda.is_available() else 32,
        "logits_processors": ["sipo.decoding.vllm.batch:MixtureProcessor"],
        "worker_extension_cls": "sipo.decoding.vllm.worker.PolicyWorker",
        "additional_config": {SLOTS: slots},
        "tensor_parallel_size": tensor_parallel,
        "distributed_executor_backend": UNIPROC if tensor_parallel == 1 else "mp",
    }


def _natural_dtype() -> str:
    """float32 on processors that would only emulate bfloat16."""
    has_bfloat16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


class OfflineDecoder:
    """The engine in this process, for a list of prompts and mixtures."""

    def __init__(
        self,
        model: Path,
        *,
        slots: int = 2,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        tensor_parallel: int = 1,
        **options: Any,
    ) -> None:
        """`options` go to vLLM's EngineArgs as they are."""
        from vllm import LLM

        self.slots = slots
        arguments = engine_arguments(
            model,
            slots=slots,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel=tensor_parallel,
        )
        self.llm = LLM(**(arguments | options))

    def load(self, key: str, adapters: Mapping[str, Path]) -> None:
        """Makes a set resident: mixtures name it by `key`. Raises IncompatiblePolicy."""
        refusals = self.llm.collective_rpc("sipo_load", args=(key, [str(folder) for folder in adapters.values()]))
        if refusal := next(filter(None, refusals), None):
            raise IncompatiblePolicy(refusal)

    def unload(self, key: str) -> None:
        self.llm.collective_rpc("sipo_unload", args=(key,))

    def close(self) -> None:
        """Ends the engine: another can then be started in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def generate(self, prompts: Sequence[Sequence[int]], mixtures: Sequence[Mixture], **sampling: Any) -> list[list[int]]:
        """The token ids of one response per prompt (token ids) and mixture; `sampling` are vLLM's SamplingParams."""
        from vllm import SamplingParams

        for mixture in mixtures:
            if (needed := len(mixture.entries)) > self.slots:
                raise InvalidRequest(f"a mixture of {needed} entries needs slots={needed}, this decoder has {self.slots}")
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ids), "cache_salt": m.cache_salt()} for ids, m in zip(prompts, mixtures, strict=True)],
            [SamplingParams(**sampling, extra_args={EXTRA_ARG: m.model_dump_json()}) for m in mixtures],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]
