"""Builders of tenants, key files and gateways that ask for keys."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.endpoints import EndpointTable
from gateway.server import Gateway
from gateway.tenants import KeyFile, StoredKey, Tenant, digest_of
from placement.spec import dump_yaml
from tests.gateway.engines import a_gateway


def a_key(name: str) -> str:
    return f"bora-key-of-{name}"


def a_tenant(name: str = "acme", **changes: Any) -> Tenant:
    keys = (StoredKey(sha256=digest_of(a_key(name))),)
    return Tenant(**{"name": name, "keys": keys, **changes})


def write_keys(path: Path, *tenants: Tenant) -> Path:
    new = path.with_suffix(".new")
    new.write_text(dump_yaml(KeyFile(tenants=tenants)))
    new.replace(path)
    return path


def bearer(name: str = "acme") -> dict[str, str]:
    return {"authorization": f"Bearer {a_key(name)}"}


@asynccontextmanager
async def a_locked_gateway(
    folder: Path, table: EndpointTable | None, *tenants: Tenant, **changes: Any
) -> AsyncIterator[Gateway]:
    path = write_keys(folder / "keys.yaml", *tenants)
    settings = {"auth": "keys", "keys_file": path, "poll_s": 0.02, **changes}
    async with a_gateway(table, **settings) as gateway:
        yield gateway


def known_spent(gateway: Gateway) -> int:
    """Tokens of the tenant, as that gateway has read them."""
    return gateway.access.accounts._accounts["acme"]._spent


def stored(folder: Path, *columns: str) -> list[tuple[int, ...]]:
    with sqlite3.connect(folder / "keys.usage.sqlite") as database:
        rows = database.execute(f"SELECT {', '.join(columns)} FROM usage").fetchall()  # noqa: S608
    database.close()
    return rows
