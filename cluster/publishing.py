"""Publisher: puts the endpoint table before gateways when it has changed, not more often than need be.

A fleet that starts changes hundreds of times within seconds, and each table names all endpoints:
told one by one, a deployment would cost the square of its replicas, here and in every gateway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cluster.sync_desk import SyncDesk
from gateway.endpoints import EndpointTable

PAUSE_S = 0.1  # between two tables; the first change after a quiet while goes out at once


class Publisher:
    """`table(version)` is what there is to tell. Lives on the running event loop."""

    def __init__(
        self,
        desk: SyncDesk,
        table: Callable[[int], EndpointTable],
        pause_s: float = PAUSE_S,
    ) -> None:
        self._desk = desk
        self._table = table
        self._pause_s = pause_s
        self._changed_s: float | None = None  # epoch seconds of the first change not yet told
        self._told_s = -pause_s  # monotonic
        self._later: asyncio.TimerHandle | None = None

    def changed(self) -> None:
        """Something may differ: tell it now, or with what else changes within the pause."""
        if self._changed_s is None:
            self._changed_s = time.time()
        if self._later is not None:
            return
        wait_s = self._told_s + self._pause_s - time.monotonic()
        if wait_s <= 0:
            self._tell()
        else:
            self._later = asyncio.get_running_loop().call_later(wait_s, self._tell)

    def _tell(self) -> None:
        self._later = None
        changed_s, self._changed_s = self._changed_s or time.time(), None
        # Milliseconds since the epoch keep growing over a restart of the controller.
        version = max(self._desk.table.version + 1, int(time.time() * 1000))
        self._desk.publish(self._table(version), changed_s)
        self._told_s = time.monotonic()
