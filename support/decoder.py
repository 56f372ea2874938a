"""The decoder as a process, and random policies for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sipo.models import BUNDLED_MODEL, BaseModelRef, model_sha256
from sipo.policies import Draft, PolicySet, PolicyStore
from sipo.prompts import PromptFormat
from support import PATIENCE

START_SECONDS = 900
"""A decoder starts in about half a minute on an idle machine; test machines are not idle."""


def random_adapter(base: Path, folder: Path, *, seed: int, rank: int, scale: float = 0.2) -> Path:
    """A PEFT adapter on q, k, v and o with both halves random: large enough to change most answers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    peft.save_pretrained(folder)
    return folder


@dataclass
class ServedDecoder:
    url: str
    base: Path
    store: PolicyStore
    workspace: Path

    @classmethod
    @contextmanager
    def start(cls, base: Path, workspace: Path, **settings: str) -> Iterator[ServedDecoder]:
        """`settings` are further SIPO_… variables."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            "SIPO_DATA_DIR": str(workspace / "data"),
            "SIPO_DECODER_PORT": str(port),
            "SIPO_DECODER_DTYPE": "float32",
            "SIPO_DECODER_MAX_MODEL_LEN": "1024",
            "SIPO_DECODER_KV_CACHE_GIB": "1",
            "SIPO_DECODER_TOOL_PARSER": "hermes",
            **settings,
        }
        with (workspace / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.decoder"], env=os.environ | environment, stderr=log, stdout=log
            )
        decoder = cls(f"http://127.0.0.1:{port}", base, PolicyStore(workspace / "data" / "policies"), workspace)
        try:
            decoder._wait(process)
            yield decoder
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
            finally:
                process.kill()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"the decoder did not start:\n{(self.workspace / 'log').read_text()[-4000:]}")

    def adapters(self, *, seed: int) -> Mapping[str, Path]:
        """Two random adapters of different ranks, made once per seed."""
        folder = self.workspace / f"adapters-{seed}"
        adapters = {"concise": folder / "concise", "warm": folder / "warm"}
        for i, (objective, rank) in enumerate((("concise", 8), ("warm", 16))):
            if not adapters[objective].exists():
                random_adapter(self.base, adapters[objective], seed=10 * seed + i, rank=rank)
        return adapters

    def publish(
        self, name: str, *, seed: int, base_sha256: str | None = None, reference: Path | None = None, activate: bool = True
    ) -> PolicySet:
        """Publishes a set of `adapters(seed=seed)`, on top of the adapter `reference`."""
        sha256 = base_sha256 or model_sha256(self.base, Path("~/.cache/sipo").expanduser())
        draft = Draft(
            name=name,
            base=BaseModelRef(name=BUNDLED_MODEL, sha256=sha256),
            prompt_format=PromptFormat.of(self.tokenizer),
            objectives=["concise", "warm"],
            beta=0.1,
        )
        return self.store.publish(draft, self.adapters(seed=seed), self.base, reference=reference, activate=activate)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.base)

    async def complete(self, prompt: list[int] | str, *, max_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        """The reply to a greedy /v1/completions that does not stop early; errors raise."""
        reply = await self.post("/v1/completions", prompt=prompt, max_tokens=max_tokens, ignore_eos=True, **fields)
        assert reply.status_code == 200, reply.text
        body: dict[str, Any] = reply.json()
        return body

    async def tokens(self, prompt: list[int] | str, **fields: Any) -> list[int]:
        body = await self.complete(prompt, return_token_ids=True, **fields)
        ids: list[int] = body["choices"][0]["token_ids"]
        return ids

    async def post(self, route: str, **body: Any) -> httpx.Response:
        async with httpx.AsyncClient(timeout=300) as client:
            return await client.post(self.url + route, json={"temperature": 0} | body)
