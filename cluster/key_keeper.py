"""KeyKeeper: the controller's hold on tenants, keys and usage, and what it tells gateways of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from cluster.key_messages import (
    CreateKeyRequest,
    KeyList,
    NewKey,
    RevokedKeys,
    RevokeKeyRequest,
    UsageQuery,
    UsageTotals,
    listed,
)
from cluster.key_store import KeyStore
from gateway.endpoints import SyncRequest
from gateway.ledger import Spent
from gateway.tenants import KeyTable, Tenant
from placement.errors import ConfigError

KEY_FILE = "keys.yaml"

log = logging.getLogger("bora.key_keeper")


class KeyKeeper:
    """One per controller. `on_change` is called when the tenants are not what they were."""

    def __init__(self, folder: Path, on_change: Callable[[], None]) -> None:
        self._store = KeyStore(folder / KEY_FILE)
        self.changed: Callable[[], None] = lambda: None  # hears of each key that is made or goes
        self._on_change = on_change
        self._turn = asyncio.Lock()
        self._table: KeyTable | None = None

    async def create(self, request: CreateKeyRequest) -> NewKey:
        """Make a key. Raises `ConfigError` as the store does."""
        async with self._turn:
            made = await asyncio.to_thread(self._store.create, request)
            self.changed()
            await self._read()
        return made

    async def revoke(self, request: RevokeKeyRequest) -> RevokedKeys:
        """Take keys away. Raises `UnknownName` if there are none of that name."""
        async with self._turn:
            ids = await asyncio.to_thread(self._store.revoke, request.name)
            self.changed()
            await self._read()
        return RevokedKeys(ids=ids)

    async def list(self) -> KeyList:
        """All tenants."""
        return listed(await asyncio.to_thread(self._store.tenants))

    async def usage(self, query: UsageQuery) -> UsageTotals:
        """What was used."""
        async with self._turn:
            return await asyncio.to_thread(self._store.usage, query.since, query.by)

    async def take(self, request: SyncRequest) -> int | None:
        """Count the usage that a gateway reports; its number, or None if it should tell it again."""
        if request.usage is None:
            return None
        async with self._turn:
            try:
                await asyncio.to_thread(self._store.prepare_usage)
                await asyncio.to_thread(self._store.add_usage, request.usage)
            except ConfigError as error:
                log.warning("usage is not counted yet: %s", error)
                return None
        return request.usage.sequence

    async def newer(self, request: SyncRequest) -> KeyTable | None:
        """The tenants, if the gateway asks for keys and has others."""
        if not request.wants_keys:
            return None
        if self._table is None:
            async with self._turn:
                await self._read()
        table = self._table
        return table if table and table.version != request.keys_version else None

    async def spent(self, request: SyncRequest) -> dict[str, Spent]:
        """What tenants with a budget have used, all gateways together."""
        tenants = self._table.tenants if self._table and request.wants_keys else ()
        if all(tenant.budget_tokens is None for tenant in tenants):
            return {}
        async with self._turn:
            try:
                await asyncio.to_thread(self._store.prepare_usage)
                return await asyncio.to_thread(self._store.spent, tenants)
            except ConfigError as error:
                log.warning("budgets go by old figures: %s", error)
                return {}

    async def _read(self) -> None:
        try:
            tenants: tuple[Tenant, ...] = await asyncio.to_thread(self._store.tenants)
        except ConfigError as error:
            log.warning("the keys stay what they were: %s", error)
            return
        # Milliseconds since the epoch keep growing over a restart of the controller.
        before = self._table.version if self._table else 0
        self._table = KeyTable(version=max(before + 1, int(time.time() * 1000)), tenants=tenants)
        self._on_change()
