"""Reward models that are functions of installed packages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from numbers import Real
from threading import Lock

from sipo.conversation import Prompt, as_text
from sipo.errors import NotFound, SipoError

ENTRY_POINTS = "sipo.reward_models"
"""The group in which a package registers its functions (prompt: str, response: str) -> float."""


class InstalledFunction:
    """An entry point of ENTRY_POINTS, asked about a conversation as one text."""

    def __init__(self, name: str) -> None:
        installed = entry_points(group=ENTRY_POINTS)
        if name not in installed.names:
            raise NotFound(
                f"no reward model {name!r} is installed: the entry points of {ENTRY_POINTS} are "
                f"{', '.join(sorted(installed.names)) or 'none'}"
            )
        try:
            self._function = installed[name].load()
        except Exception as error:
            raise SipoError(f"the reward model python:{name} cannot be imported: {type(error).__name__}: {error}") from error
        self._name = name
        self._lock = Lock()

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        with self._lock:  # nobody asked its author about threads
            return [self._reward(as_text(prompt), response) for response in responses]

    def _reward(self, prompt: str, response: str) -> float:
        try:
            value = self._function(prompt, response)
        except Exception as error:
            raise SipoError(f"the reward model python:{self._name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(value, Real):
            raise SipoError(f"the reward model python:{self._name} returned {value!r}, which is no number")
        return float(value)
