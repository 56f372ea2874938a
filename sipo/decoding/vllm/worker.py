"""Policy sets come and go in a running engine: methods that vLLM adds to its worker and calls between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipo.errors import IncompatiblePolicy, Unavailable
from sipo.lora import load_adapter

if TYPE_CHECKING:
    from sipo.decoding.vllm.model import MixingModel


Refusal = tuple[str, str]
"""An error's class and message: between processes an exception would lose its type."""


class PolicyWorker:
    """vLLM's --worker-extension-cls."""

    model_runner: Any

    def sipo_load(self, key: str, policies: list[str], reference: str | None) -> Refusal | None:
        """Makes a set resident under `key`: PEFT folders, `policies` in the order of the coefficients."""
        model: MixingModel = self.model_runner.get_model()
        try:
            loaded = [load_adapter(Path(folder)) for folder in policies]
            model.load(key, loaded, None if reference is None else load_adapter(Path(reference)))
        except (IncompatiblePolicy, Unavailable) as error:
            return type(error).__name__, error.message
        return None

    def sipo_unload(self, key: str) -> None:
        """The set must have no running request: the caller counts them."""
        self.model_runner.get_model().unload(key)


def check_loaded(refusals: Sequence[Refusal | None]) -> None:
    """Raises what the ranks' sipo_load refused: IncompatiblePolicy for a set that cannot be mixed, Unavailable for want of room."""
    for kind, message in filter(None, refusals):
        raise Unavailable(message) if kind == Unavailable.__name__ else IncompatiblePolicy(message)
