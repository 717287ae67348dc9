"""Builders for tests of accounts: calls of tenants, what came of them, and a day to do it on."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gateway.accounts import Accounts
from gateway.call import Call, make_call
from gateway.record import Record
from gateway.tenants import Tenant
from tests.gateway.engines import (
    CHAT,
)

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


def a_call(tenant: Tenant, body: bytes = b'{"model": "chat", "max_tokens": 100}') -> Call:
    call = make_call("http", CHAT, body.replace(b"{", b'{"model": "chat", ', 1), {}, "id")
    call.body = body
    call.belongs_to(tenant)
    return call


def a_record(**changes: Any) -> Record:
    return Record(
        **{
            "api": "http",
            "path": CHAT,
            "request_id": "id",
            "model": "chat",
            "status": 200,
            **changes,
        }
    )


def some_accounts(now: list[float], wall: list[float] | None = None, **changes: Any) -> Accounts:
    days = wall or [NOON]
    return Accounts(clock=lambda: now[0], wall_clock=lambda: days[0], **changes)
