"""Where the tenants come from and where their usage goes: a key file and the SQLite file next to it."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gateway.access import Access
from gateway.errors import StartupFailed
from gateway.ledger import UsageRow
from gateway.tenants import KeyFile
from gateway.usage_store import UsageStore, usage_file
from placement.errors import ConfigError
from placement.spec import load_yaml

_log = logging.getLogger(__name__)
_FLUSH_S = 0.5


class KeyFeed:
    """Follows a key file, and writes down what its tenants use. Wrong content is not taken."""

    def __init__(
        self,
        path: Path,
        access: Access,
        *,
        poll_s: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._access = access
        self._poll_s = poll_s
        self._wall_clock = wall_clock
        self._store = UsageStore(usage_file(path))
        self._unwritten: tuple[UsageRow, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._failing = False
        self._writing = threading.Lock()

    def start(self) -> None:
        """Take the keys, and what was spent before.

        Raises:
            StartupFailed: there is no key file, it is wrong, or usage cannot be kept next to it.
        """
        try:
            tenants = self._load()
        except ConfigError as error:
            made = f"make one with `bora keys create NAME --file {self._path}`"
            hint = "" if self._path.exists() else f"; {made}"
            raise StartupFailed(f"the gateway needs its keys: {error}{hint}") from error
        try:
            self._store.prepare()
            spent = self._store.spent(tenants.tenants, self._wall_clock())
        except (OSError, sqlite3.Error) as error:
            raise StartupFailed(
                f"usage cannot be kept in {self._store.path}: {error}. The key file's folder must"
                " be writable, and the file one of ours"
            ) from error
        self._access.apply(tenants.tenants)
        self._access.accounts.flushed(spent)

    async def follow(self) -> None:
        """Take the file whenever it changes, and write usage twice a second, for ever."""
        step_s = min(self._poll_s, _FLUSH_S)
        due = time.monotonic() + _FLUSH_S
        while True:
            await asyncio.sleep(step_s)
            if self._stamp() != self._seen:
                await self._take_new()
            if time.monotonic() >= due:
                due = time.monotonic() + _FLUSH_S
                await asyncio.to_thread(self.flush_taken, self._take())
                await self._rebase()

    def flush(self) -> None:
        """Write what is left; blocks."""
        self.flush_taken(self._take())

    def flush_taken(self, rows: tuple[UsageRow, ...]) -> None:
        """Write `rows` and what could not be written before. For any thread; blocks."""
        with self._writing:  # at the end, the last flush meets one that is still under way
            self._unwritten += rows
            try:
                self._store.add(self._unwritten)
            except sqlite3.Error as error:
                if not self._failing:
                    text = "usage cannot be written to %s, it is kept: %s"
                    _log.error(text, self._store.path, error)
                self._failing = True
            else:
                self._unwritten, self._failing = (), False

    def _take(self) -> tuple[UsageRow, ...]:
        self._access.accounts.flushing()
        return self._access.accounts.ledger.take()

    async def _rebase(self) -> None:
        """Go by what all workers have written."""
        ring = self._access.ring
        if self._unwritten or ring is None:
            return
        tenants, wall = list(ring.tenants.values()), self._wall_clock()
        try:
            spent = await asyncio.to_thread(self._store.spent, tenants, wall)
        except sqlite3.Error as error:
            _log.error("usage cannot be read from %s: %s", self._store.path, error)
            return
        self._access.accounts.flushed(spent)

    async def _take_new(self) -> None:
        try:
            tenants = (await asyncio.to_thread(self._load)).tenants
        except ConfigError as error:
            _log.error("key file not taken, the old keys stay: %s", error)
            return
        self._access.apply(tenants)
        _log.info("keys of %d tenants", len(tenants))

    def _load(self) -> KeyFile:
        self._seen = self._stamp()
        return load_yaml(self._path, KeyFile)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
