"""Policy sets come and go in a running engine: methods that vLLM adds to its worker and calls between two steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipo.errors import IncompatiblePolicy
from sipo.lora import load_adapter

if TYPE_CHECKING:
    from sipo.decoding.vllm.model import MixingModel


class PolicyWorker:
    """vLLM's --worker-extension-cls. Refusals are returned as text: between processes an exception would lose its type."""

    model_runner: Any

    def sipo_load(self, key: str, adapters: list[str]) -> str | None:
        """Makes a set resident under `key`; `adapters` are PEFT folders in the order of the coefficients."""
        model: MixingModel = self.model_runner.get_model()
        try:
            model.load(key, [load_adapter(Path(folder)) for folder in adapters])
        except IncompatiblePolicy as error:
            return error.message
        return None

    def sipo_unload(self, key: str) -> None:
        """The set must have no running request: the caller counts them."""
        self.model_runner.get_model().unload(key)
