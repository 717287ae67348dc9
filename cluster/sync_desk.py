"""SyncDesk: what the controller tells gateways (endpoint table, keys) and hears from them (usage)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from cluster.key_keeper import KeyKeeper
from gateway.endpoints import EndpointTable, SyncRequest, SyncResponse

_REMEMBERED_TABLES = 4096  # ten a second at most: those of some minutes


class SyncDesk:
    """Holds the newest table, and the keys in `folder`. While `settling`, no table is handed out."""

    def __init__(self, folder: Path, settling: Callable[[], bool]) -> None:
        self.table = EndpointTable()
        self.keys = KeyKeeper(folder, self._wake)
        self._settling = settling
        self._changed = asyncio.Event()
        # Version of each table, and since when (epoch s) there was something new to tell in it.
        self._changes: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED_TABLES)

    def publish(self, table: EndpointTable, changed_s: float) -> None:
        """Put a new table before all waiting gateways, if it routes otherwise than the last.

        `changed_s`: when the first change in it was heard of, epoch seconds.
        """
        now, last = table, self.table
        if (now.models, now.endpoints) != (last.models, last.endpoints):
            self.table = table
            self._changes.append((table.version, changed_s))
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
                return SyncResponse(
                    table=table,
                    changed_s=self._lacking_since(request.version) if table else 0.0,
                    keys=keys,
                    usage_sequence=counted,
                    spent=spent,
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), remaining)

    def _lacking_since(self, version: int) -> float:
        """When the first change after that table was heard of; it may have missed several."""
        since_s = 0.0
        if version >= 0:  # who has no table yet did not wait for any change
            for told, changed_s in reversed(self._changes):
                if told <= version:
                    break
                since_s = changed_s
        return since_s

    def _wake(self) -> None:
        """Something that gateways wait for has changed."""
        self._changed.set()
        self._changed = asyncio.Event()


class SyncText:
    """Answers as JSON. A table is made into text once, for however many gateways ask."""

    def __init__(self) -> None:
        self._table: EndpointTable | None = None
        self._text = ""

    def of(self, answer: SyncResponse) -> str:
        """What `answer.model_dump_json()` says."""
        table = answer.table
        if table is None:
            return answer.model_dump_json()
        if table is not self._table:
            self._table, self._text = table, table.model_dump_json(exclude_defaults=True)
        return f'{{"table":{self._text},{answer.model_dump_json(exclude={"table"})[1:]}'
