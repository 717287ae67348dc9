"""Adapters: the LoRA adapters of one engine, kept equal to what the plan names. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

from cluster.errors import AdapterFailed

UNLOAD_AFTER_S = 3.0  # gateways that sync twice a second send nothing there any more
RETRY_S = (5.0, 60.0)  # first and longest pause after a failure


class AdapterEngine(Protocol):
    """What loads adapters while it serves."""

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load it under that name; `AdapterFailed` when the engine refuses."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget it; requests that run go on. `AdapterFailed` when the engine refuses."""
        ...


class Locate(Protocol):
    """Brings an adapter's folder to this node."""

    async def __call__(self, source: str, tell: Callable[[str], None]) -> Path:
        """The folder; `tell` is given how far it is, empty: it does nothing. `AdapterFailed`."""
        ...


class Adapters:
    """`loaded` is what may be routed to: names, and the engine's name of each.

    The engine's name is the same, but while one source replaces another, both are loaded and the new
    one gets a name of its own: so nobody's answer changes in the middle. `failures`: why those that
    are missing do. `stages`: how far those are that come just now.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        locate: Locate,
        *,
        retry_s: tuple[float, float] = RETRY_S,
        unload_after_s: float = UNLOAD_AFTER_S,
    ) -> None:
        self.loaded: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.stages: dict[str, str] = {}
        self._engine = engine
        self._locate = locate
        self._wanted: dict[str, str] = {}
        self._sources: dict[str, str] = {}  # of all that the engine has, by its names
        self._unused_s: dict[str, float] = {}  # since when (monotonic), by the engine's names
        self._first_retry_s, self._longest_retry_s = retry_s
        self._retry_s = self._retry_in_s = self._first_retry_s
        self._unload_after_s = unload_after_s
        self._woken = asyncio.Event()
        self._settled = asyncio.Event()

    async def settled(self, timeout_s: float) -> None:
        """Wait until each that is wanted was tried once, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), timeout_s)

    def want(self, adapters: Mapping[str, str]) -> None:
        """From now on these, by name: folders or repo ids."""
        if self._wanted != adapters:
            self._wanted = dict(adapters)
            self._retry_s = self._first_retry_s
            self._woken.set()

    async def run_forever(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Load and unload what differs, and try again what failed; `changed` hears of each."""
        while True:
            await self.settle(changed)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._pause_s())

    async def settle(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Try once to make the engine's adapters equal to those that are wanted."""
        self._woken.clear()
        wanted = dict(self._wanted)
        gone = [name for name in (*self.loaded, *self.failures) if name not in wanted]
        for name in gone:
            self.loaded.pop(name, None)
            self.failures.pop(name, None)
        if gone:
            await changed()
        failed = False
        for name, source in wanted.items():
            before = self.loaded.get(name), self.failures.get(name)
            try:
                self.loaded[name] = await self._bring(name, source)
                self.failures.pop(name, None)
            except AdapterFailed as error:
                failed = True
                self.failures[name] = str(error)
            if before != (self.loaded.get(name), self.failures.get(name)):
                await changed()
        self._retry_in_s = self._retry_s
        longer_s = min(2 * self._retry_s, self._longest_retry_s)
        self._retry_s = longer_s if failed else self._first_retry_s
        await self._unload_unused()
        self._settled.set()

    async def _bring(self, name: str, source: str) -> str:
        """The engine's name of `source`, which is loaded now."""
        served = self._served_name(name, source)
        if served not in self._sources:
            try:
                folder = await self._locate(source, lambda stage: self._note(name, stage))
            finally:
                self._note(name, "")
            await self._engine.load_adapter(served, folder)
            self._sources[served] = source
        return served

    def _note(self, name: str, stage: str) -> None:
        self.stages.pop(name, None)
        if stage:
            self.stages[name] = stage

    def _served_name(self, name: str, source: str) -> str:
        if self._sources.get(name, source) == source:
            return name
        return f"{name}@{hashlib.sha256(source.encode()).hexdigest()[:8]}"

    async def _unload_unused(self) -> None:
        """What nobody asks for any more goes, once gateways know that."""
        now_s, used = time.monotonic(), set(self.loaded.values())
        for served in list(self._sources):
            if served in used:
                self._unused_s.pop(served, None)
            elif now_s - self._unused_s.setdefault(served, now_s) >= self._unload_after_s:
                with contextlib.suppress(
                    AdapterFailed
                ):  # the engine lacks it: that is what is wanted
                    await self._engine.unload_adapter(served)
                del self._sources[served], self._unused_s[served]

    def _pause_s(self) -> float | None:
        if self._unused_s:
            return self._unload_after_s
        return self._retry_in_s if self.failures else None
