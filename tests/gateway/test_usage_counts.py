"""What tenants use: kept in a ledger and a store, and counted by a gateway with real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.accounts import Account
from gateway.errors import QuotaSpent
from gateway.ledger import Ledger, UsageReport, UsageRow
from gateway.usage import Usage
from gateway.usage_store import UsageStore
from tests.gateway.accounting import NOON, a_call, a_record, some_accounts
from tests.gateway.engines import (
    CHAT,
    USAGE,
    a_chat,
    a_client,
    a_table,
    an_endpoint,
    an_engine,
    until,
)
from tests.gateway.tenants import a_locked_gateway, a_tenant, bearer, stored


def a_row(**changes: Any) -> UsageRow:
    return UsageRow(
        **{"tenant": "acme", "model": "chat", "day": "2026-11-22", "requests": 1, **changes}
    )


def test_a_store_adds_up_and_groups_and_counts_a_report_once(tmp_path: Path) -> None:
    store = UsageStore(tmp_path / "usage.sqlite")
    store.prepare()
    store.prepare()
    store.add([a_row(prompt_tokens=5), a_row(day="2026-11-21", completion_tokens=7)])
    report = UsageReport(source="a-gateway", sequence=1, rows=(a_row(model="code"),))

    assert store.add_report(report)
    assert not store.add_report(report)
    assert store.add_report(report.model_copy(update={"sequence": 2}))
    assert store.add_report(report.model_copy(update={"source": "another-gateway"}))

    assert [(row["tenant"], row["requests"]) for row in store.totals()] == [("acme", 5)]
    assert [(row["model"], row["day"], row["requests"]) for row in store.totals(by=["model"])] == [
        ("chat", "*", 2),
        ("code", "*", 3),
    ]
    by_day = store.totals(since="2026-11-22", by=["day", "tenant"])
    assert [(row["day"], row["requests"]) for row in by_day] == [("2026-11-22", 4)]
    tenants = [a_tenant(budget_tokens=9), a_tenant("idle", budget_tokens=9, budget_period="day")]
    assert store.spent(tenants, NOON) == {"acme": ("2026-11", 12), "idle": ("2026-11-22", 0)}
    assert (tmp_path / "usage.sqlite").stat().st_mode & 0o777 == 0o600


def test_a_flush_neither_forgets_nor_counts_twice() -> None:
    tenant = a_tenant(budget_tokens=1000)
    accounts = some_accounts([1.0])

    def use(tokens: int) -> None:
        record = a_record(usage=Usage(tokens, 0))
        accounts.leave(accounts.enter(tenant, "chat", a_call(tenant)), record)

    use(100)
    accounts.flushing()
    accounts.ledger.take()
    use(50)  # while it is being written
    accounts.flushed({"acme": ("2026-11", 700)})  # others have used 600
    account: Account = accounts._accounts["acme"]

    assert account._spent + account._unflushed == 750
    use(250)
    with pytest.raises(QuotaSpent):
        use(1)


def test_a_ledger_adds_up_by_tenant_model_and_day() -> None:
    wall = [NOON]
    ledger = Ledger(lambda: wall[0])
    ledger.add("a", "chat", Usage(1, 2), estimated=False)
    ledger.add("a", "chat", Usage(1, 2), estimated=True)
    wall[0] += 86400
    ledger.add("a", "chat", Usage(1, 2), estimated=False)

    rows = ledger.take()

    assert [(row.day, row.requests, row.prompt_tokens, row.estimated_tokens) for row in rows] == [
        ("2026-11-22", 2, 2, 3),
        ("2026-11-23", 1, 1, 0),
    ]
    assert ledger.take() == ()


async def test_usage_is_what_the_engine_reported_and_is_written_before_the_end(
    tmp_path: Path,
) -> None:
    usage = {"stream_options": {"include_usage": True}, "stream": True}
    async with (
        an_engine() as engine,
        a_locked_gateway(tmp_path, a_table(an_endpoint(engine)), a_tenant()) as gateway,
        a_client(gateway) as client,
    ):
        for body in (a_chat(), a_chat(**usage)):
            await (await client.post(CHAT, json=body, headers=bearer())).read()
        await until(lambda: stored(tmp_path, "requests") == [(2,)])
        expected = (2 * USAGE["prompt_tokens"], 2 * USAGE["completion_tokens"], 0)
        columns = ("prompt_tokens", "completion_tokens", "estimated_tokens")
        assert stored(tmp_path, *columns) == [expected]

        await client.post(CHAT, json=a_chat(), headers=bearer())  # and the last one at the end
    assert stored(tmp_path, "requests") == [(3,)]


async def test_a_stream_without_usage_is_counted_by_its_events_and_marked(tmp_path: Path) -> None:
    async with (
        an_engine() as engine,
        a_locked_gateway(tmp_path, a_table(an_endpoint(engine)), a_tenant()) as gateway,
        a_client(gateway) as client,
    ):
        body = a_chat(stream=True)
        await (await client.post(CHAT, json=body, headers=bearer())).read()
    [(prompt, completion, estimated)] = stored(
        tmp_path, "prompt_tokens", "completion_tokens", "estimated_tokens"
    )
    assert completion == 3
    assert 10 < prompt < 30
    assert estimated == prompt + completion


async def test_a_client_that_leaves_pays_for_what_it_got(tmp_path: Path) -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine)), a_tenant(max_in_flight=1)
        ) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(stream=True), headers=bearer())
        await response.content.readany()
        assert (await client.post(CHAT, json=a_chat(), headers=bearer())).status == 429
        response.close()
        await until(lambda: engine.hung_up_on == 1)
        assert gateway.access.accounts._accounts["acme"].in_flight == 0
    assert stored(tmp_path, "completion_tokens") == [(1,)]
