"""Which policy sets are in the engine's memory. Sets are loaded when a request needs one, and the one unused for longest makes
room; a set with running requests stays, so a request ends on the set that it began with."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import structlog

from sipo.errors import Unavailable
from sipo.policies import PolicySet

log = structlog.get_logger(__name__)


class Loader(Protocol):
    async def load(self, key: str, adapters: Mapping[str, Path]) -> None: ...

    async def unload(self, key: str) -> None: ...


def resident_key(policy_set: PolicySet) -> str:
    """Names a set by its content too, so that nothing cached for it can be taken for another set's that had the same id."""
    adapters = "".join(policy_set.manifest.adapters[name].sha256 for name in policy_set.objectives)
    return f"{policy_set.id}-{hashlib.sha256(adapters.encode()).hexdigest()[:12]}"


class ResidentSets:
    """At most `capacity` sets at rest; one more for a moment while one takes another's place."""

    def __init__(self, loader: Loader, capacity: int) -> None:
        self._loader = loader
        self._capacity = capacity
        self._running: dict[str, int] = {}
        """Running requests by resident set, the set used last at the end."""
        self._loading = asyncio.Lock()

    @asynccontextmanager
    async def lease(self, policy_set: PolicySet) -> AsyncIterator[None]:
        """Holds the set in memory, loading it first if need be. Raises Unavailable if every other one is in use."""
        key = resident_key(policy_set)
        if key not in self._running:
            async with self._loading:
                if key not in self._running:
                    await self._load(key, policy_set)
        self._running[key] = self._running.pop(key) + 1
        try:
            yield
        finally:
            self._running[key] -= 1

    async def _load(self, key: str, policy_set: PolicySet) -> None:
        victim = None
        if len(self._running) >= self._capacity:
            victim = next((name for name, requests in self._running.items() if not requests), None)
            if victim is None:
                raise Unavailable(
                    f"{policy_set.id} is not in memory and all {self._capacity} resident policy sets have running requests: "
                    "try again soon, or start the decoder with more SIPO_DECODER_SETS"
                )
            # From here on a request for the victim would load it again rather than lease what is about to go.
            del self._running[victim]
        try:
            await asyncio.to_thread(policy_set.verify)
            await self._loader.load(key, {name: policy_set.adapter_dir(name) for name in policy_set.objectives})
        except BaseException:
            if victim is not None:
                self._running = {victim: 0, **self._running}
            raise
        if victim is not None:
            await self._loader.unload(victim)
        self._running[key] = 0
        log.info("policy set loaded", policy_set=policy_set.id, unloaded=victim)
