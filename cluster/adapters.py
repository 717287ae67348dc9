"""Adapters: the LoRA adapters of one engine, kept equal to what the plan names. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

from cluster.errors import AdapterFailed, EngineSilent

log = logging.getLogger("bora.adapters")

UNLOAD_AFTER_S = 3.0  # gateways that sync twice a second send nothing there any more
RETRY_S = (5.0, 60.0)  # first and longest pause after a failure, of each adapter
_UNKNOWN = ""  # the source of what a silent engine may have


class AdapterEngine(Protocol):
    """What loads adapters while it serves."""

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load it under that name.

        Raises:
            AdapterFailed: the engine refuses.
            EngineSilent: it does not answer.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget it; requests that run go on. Raises as `load_adapter`."""
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
        self._retries: dict[str, tuple[float, float]] = {}  # when (monotonic), and the last pause
        self._taken_out = False
        self._unload_after_s = unload_after_s
        self._woken = asyncio.Event()
        self._settled = asyncio.Event()

    async def settled(self, timeout_s: float) -> None:
        """Wait until each that is wanted was tried once, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), timeout_s)

    def want(self, adapters: Mapping[str, str]) -> None:
        """From now on these, by name: folders or repo ids.

        Nobody is routed to others from now on, whatever is being brought just now.
        """
        if self._wanted != adapters:
            self._wanted = dict(adapters)
            for name in {*self.loaded, *self.failures} - self._wanted.keys():
                self._taken_out = True
                self.loaded.pop(name, None)
                self.failures.pop(name, None)
            self._retries.clear()
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
        if self._taken_out:
            self._taken_out = False
            await changed()
        for name, source in list(self._wanted.items()):
            if time.monotonic() < self._retries.get(name, (0.0, 0.0))[0]:
                continue
            before = self.loaded.get(name), self.failures.get(name)
            await self._try(name, source)
            if before != (self.loaded.get(name), self.failures.get(name)):
                await changed()
        await self._unload_unused()
        self._settled.set()

    async def _try(self, name: str, source: str) -> None:
        served, failure = "", ""
        try:
            served = await self._bring(name, source)
        except AdapterFailed as error:
            failure = str(error)
        if self._wanted.get(name) != source:
            return  # something else is wanted by now
        if served:
            self.loaded[name] = served
            self.failures.pop(name, None)
            self._retries.pop(name, None)
            return
        self.failures[name] = failure
        _, last_s = self._retries.get(name, (0.0, 0.0))
        pause_s = min(2 * last_s or self._first_retry_s, self._longest_retry_s)
        self._retries[name] = time.monotonic() + pause_s, pause_s

    async def _bring(self, name: str, source: str) -> str:
        """The engine's name of `source`, which is loaded now."""
        served = self._served_name(name, source)
        if self._sources.get(served) != source:
            try:
                folder = await self._locate(source, lambda stage: self._note(name, stage))
            finally:
                self._note(name, "")
            try:
                await self._engine.load_adapter(served, folder)
            except EngineSilent:
                self._sources[served] = _UNKNOWN  # it may have it, and must not keep it for ever
                raise
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
                try:
                    await self._engine.unload_adapter(served)
                except EngineSilent:
                    continue  # it may have it still: the next round asks again
                except AdapterFailed as error:
                    log.info("%s", error)  # the engine lacks it: that is what is wanted
                del self._sources[served], self._unused_s[served]

    def _pause_s(self) -> float | None:
        """Until something is to be done, though nothing else is wanted; None: nothing is."""
        now_s = time.monotonic()
        due = [due_s - now_s for due_s, _ in self._retries.values()]
        due += [self._unload_after_s] if self._unused_s else []
        return max(min(due), 0.0) if due else None
