"""Starts the decoder: reads the settings and joins vLLM with our routes."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from services.common import logging
from services.common.settings import load
from services.common.web.app import serve
from services.decoder.app import Engine, create_app
from services.decoder.settings import DecoderSettings
from sipo.decoding.vllm import set_environment


def main() -> None:
    settings = load(DecoderSettings)
    logging.configure("decoder", settings.log_level)
    set_environment(kv_cache_gib=settings.decoder_kv_cache_gib, threads=settings.decoder_threads)

    @asynccontextmanager
    async def open_engine(model: Path) -> AsyncIterator[Engine]:
        # The model's folder has all that is needed: nothing may wait for a hub that is not there.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        # Importing vLLM takes seconds: in a thread, so that /ready answers meanwhile.
        server = await asyncio.to_thread(importlib.import_module, "sipo.decoding.vllm.server")
        async with server.openai_server(
            model,
            settings.model,
            slots=settings.decoder_slots,
            tensor_parallel=settings.decoder_tensor_parallel,
            compiled=settings.decoder_compiled,
            ranks=settings.decoder_ranks,
            gpu_memory=settings.decoder_gpu_memory,
            tool_parser=settings.decoder_tool_parser,
            dtype=settings.decoder_dtype,
            max_model_len=settings.decoder_max_model_len,
            max_num_seqs=settings.decoder_max_num_seqs,
            sleeps=settings.decoder_sleeps,
        ) as engine:
            yield engine

    serve(create_app(settings, open_engine), settings.host, settings.decoder_port)
