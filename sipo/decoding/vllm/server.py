"""vLLM's own OpenAI server as an ASGI application, with an engine whose policy sets can be changed. It trusts its caller: requests
must carry their Mixture and cache salt already, and name resident sets only."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from sipo.decoding.vllm.engine import engine_arguments, served_architecture
from sipo.decoding.vllm.worker import check_loaded
from sipo.errors import InvalidRequest
from sipo.policies import REFERENCE


class OpenAIServer:
    """A running engine: `app` answers OpenAI's routes."""

    def __init__(self, client: AsyncLLM, app: Any) -> None:
        self.app = app
        self._client = client

    @property
    def failed(self) -> bool:
        """True once the engine's process is gone: nothing but a new start helps."""
        return bool(self._client.errored)

    async def load(self, key: str, adapters: Mapping[str, Path]) -> None:
        """Makes a set resident under `key`, between two steps of the engine; `adapters` as PolicySet.folders. Raises as
        check_loaded."""
        folders = {name: str(folder) for name, folder in adapters.items()}
        reference = folders.pop(REFERENCE, None)
        check_loaded(await self._client.collective_rpc("sipo_load", args=(key, list(folders.values()), reference)))

    async def unload(self, key: str) -> None:
        await self._client.collective_rpc("sipo_unload", args=(key,))

    async def sleep(self) -> None:
        """Weights go to the host's memory, keys and values are dropped, and requests wait; on a CPU they only wait. Sets that are
        not compiled stay in the GPU's memory: unload them first. What runs ends before."""
        await self._client.sleep(level=1, mode="wait")

    async def wake(self) -> None:
        """Raises what vLLM does if the memory is not there any more."""
        await self._client.wake_up()


def check_start(model: Path, tool_parser: str | None) -> None:
    """Raises InvalidRequest for an architecture that the plugin was not made for, and for a parser that vLLM does not have."""
    served_architecture(model)
    known = ToolParserManager.list_registered()
    if tool_parser is not None and tool_parser not in known:
        raise InvalidRequest(f"SIPO_DECODER_TOOL_PARSER={tool_parser} is none of vLLM's: {', '.join(known)}")


@asynccontextmanager
async def openai_server(
    model: Path, served_name: str, *, slots: int, gpu_memory: float, tool_parser: str | None, sleeps: bool, **engine: Any
) -> AsyncIterator[OpenAIServer]:
    """Starts the engine, and stops it at the end; `engine` as for engine_arguments. The event loop stays free meanwhile.

    `sleeps`: its memory is such that `sleep` can give it up.
    """
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    settings = engine_arguments(model, slots=slots, **engine) | {
        "served_model_name": [served_name],
        "scheduling_policy": "priority",
        "gpu_memory_utilization": gpu_memory,
        "enable_sleep_mode": sleeps and torch.cuda.is_available(),  # refused on a CPU, where all that sleeping does is to wait
        "disable_fastapi_docs": True,
        "tool_call_parser": tool_parser,
        "enable_auto_tool_choice": tool_parser is not None,
        "trust_request_chat_template": True,  # policies may have their own; whoever asks us lets no caller's pass
        "enable_prompt_tokens_details": True,  # how many came from the prefix cache
    }
    vars(args).update(settings)
    starting = asyncio.create_task(asyncio.to_thread(_start, args))
    try:
        client = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # The thread waits for the engine's process: without it, it ends at once.
        for child in multiprocessing.active_children():
            child.terminate()
        await asyncio.wait([starting])
        if starting.exception() is None:
            starting.result().shutdown()
        raise
    try:
        tasks = await client.get_supported_tasks()
        level = logging.root.level
        app = build_app(args, tasks, client.model_config)
        logging.root.setLevel(level)  # a library that it imports turns all logs off but errors
        await init_app_state(client, app.state, args, tasks)
        yield OpenAIServer(client, app)
    finally:
        client.shutdown()


def _start(args: Namespace) -> AsyncLLM:
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER)
