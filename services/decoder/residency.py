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
    async def load(self, key: str, adapters: Mapping[str, Path]) -> None:
        """`adapters` as PolicySet.folders. Raises Unavailable where sets in memory leave no room for this one."""
        ...

    async def unload(self, key: str) -> None: ...


def resident_key(policy_set: PolicySet) -> str:
    """Names a set by its content too, so that nothing cached for it can be taken for another set's that had the same id."""
    manifest = policy_set.manifest
    content = "".join(manifest.adapters[name].sha256 for name in policy_set.objectives)
    if manifest.reference is not None:
        content += f" on {manifest.reference.sha256}"
    return f"{policy_set.id}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


class ResidentSets:
    """At most `capacity` sets at rest. While answers run that began on older sets, up to twice as many: a newly published set need
    not wait until they have ended."""

    def __init__(self, loader: Loader, capacity: int) -> None:
        self._loader = loader
        self._capacity = capacity
        self._running: dict[str, int] = {}
        """Running requests by resident set, the set used last at the end."""
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def lease(self, policy_set: PolicySet) -> AsyncIterator[None]:
        """Holds the set in memory, loading it first if need be. Raises Unavailable if too many others are in use."""
        key = resident_key(policy_set)
        if key not in self._running:
            async with self._changing:
                if key not in self._running:
                    await self._load(key, policy_set)
        self._running[key] = self._running.pop(key) + 1
        try:
            yield
        finally:
            self._running[key] -= 1
            await self._make_room()

    async def empty(self) -> None:
        """Unloads all sets; none may have running requests."""
        async with self._changing:
            for key in list(self._running):
                await self._unload(key)

    async def _load(self, key: str, policy_set: PolicySet) -> None:
        if len(self._running) >= 2 * self._capacity and all(self._running.values()):
            raise Unavailable(
                f"{policy_set.id} is not in memory and all {len(self._running)} resident policy sets have running requests: "
                "try again soon, or start the decoder with more SIPO_DECODER_SETS"
            )
        await asyncio.to_thread(policy_set.verify)
        while True:
            try:
                await self._loader.load(key, policy_set.folders)
                break
            except Unavailable:
                idle = next((other for other, requests in self._running.items() if not requests), None)
                if idle is None:
                    raise
                await self._unload(idle)
        self._running[key] = 0
        log.info("policy set loaded", policy_set=policy_set.id)

    async def _make_room(self) -> None:
        if len(self._running) <= self._capacity:
            return
        async with self._changing:
            idle = [key for key, requests in self._running.items() if not requests]
            for key in idle[: max(len(self._running) - self._capacity, 0)]:
                # A request for it that comes now waits for the lock and loads it again, rather than lease what is about to go.
                if not self._running[key]:
                    await self._unload(key)

    async def _unload(self, key: str) -> None:
        del self._running[key]
        await self._loader.unload(key)
        log.info("policy set unloaded", policy_set=key)
