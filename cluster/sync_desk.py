"""SyncDesk: what the controller tells gateways (endpoint table, keys) and hears from them (usage)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from cluster.key_keeper import KeyKeeper
from gateway.endpoints import EndpointTable, SyncRequest, SyncResponse


class SyncDesk:
    """Holds the newest table, and the keys in `folder`. While `settling`, no table is handed out."""

    def __init__(self, folder: Path, settling: Callable[[], bool]) -> None:
        self.table = EndpointTable()
        self.keys = KeyKeeper(folder, self._wake)
        self._settling = settling
        self._changed = asyncio.Event()

    def publish(self, table: EndpointTable) -> None:
        """Put a new table before all waiting gateways, if it routes otherwise than the last."""
        now, last = table, self.table
        if (now.models, now.endpoints) != (last.models, last.endpoints):
            self.table = table
            self._wake()

    async def answer(self, request: SyncRequest) -> SyncResponse:
        """Count the usage that is told; answer when the gateway lacks a table or keys, or in time."""
        deadline = time.monotonic() + request.wait_s
        counted = await self.keys.take(request)
        while True:
            changed, remaining = self._changed, deadline - time.monotonic()
            same = request.version == self.table.version or self._settling()
            table = None if same else self.table
            keys = await self.keys.newer(request)
            if table or keys or remaining <= 0:
                spent = await self.keys.spent(request)
                return SyncResponse(table=table, keys=keys, usage_sequence=counted, spent=spent)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), remaining)

    def _wake(self) -> None:
        """Something that gateways wait for has changed."""
        self._changed.set()
        self._changed = asyncio.Event()
