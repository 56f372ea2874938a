"""Starts the decoder: reads the settings and joins vLLM with our routes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from services.common import logging
from services.common.settings import load
from services.common.web.app import serve
from services.decoder.app import Engine, create_app
from services.decoder.settings import DecoderSettings
from services.decoder.start import settle
from sipo.decoding.vllm import set_environment
from sipo.errors import InvalidRequest, NotFound
from sipo.models import resolve_model


def main() -> None:
    settings = load(DecoderSettings)
    logging.configure("decoder", settings.log_level)
    try:
        folder = resolve_model(settings.model, settings.cache_dir)
        set_environment(kv_cache_gib=settings.decoder_kv_cache_gib, threads=settings.decoder_threads)
        # The model's folder has all that is needed: nothing may wait for a hub that is not there.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        server = importlib.import_module("sipo.decoding.vllm.server")  # now that its environment is set
        server.check_start(folder, settings.decoder_tool_parser)
        settings = settle(settings, folder)
    except (InvalidRequest, NotFound) as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from None  # another start would end the same

    @asynccontextmanager
    async def open_engine(model: Path) -> AsyncIterator[Engine]:
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
