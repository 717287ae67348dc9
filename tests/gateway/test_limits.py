"""Limits, budgets and usage of tenants, from buckets up to a gateway with real sockets."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.accounts import Account, Accounts, Visit
from gateway.call import Call, make_call
from gateway.endpoints import ServedModel
from gateway.errors import LimitReached, QuotaSpent, RateLimited
from gateway.ledger import Ledger, UsageReport, UsageRow, period_end_s, period_of
from gateway.prediction import prompt_tokens
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from gateway.record import Record
from gateway.shared_cells import SharedCells
from gateway.tenants import Tenant
from gateway.token_bucket import TokenBucket
from gateway.usage import Usage
from gateway.usage_store import UsageStore
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
from tests.gateway.tenants import a_locked_gateway, a_tenant, bearer, write_keys
from tests.gateway.test_server import a_process, ports

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


def test_a_bucket_is_full_at_first_fills_evenly_and_may_owe() -> None:
    bucket = TokenBucket(60, [0.0, 0.0], 0)
    assert bucket.level(5.0) == 60

    bucket.correct(70, 5.0)

    assert bucket.level(5.0) == -10
    assert bucket.wait_s(1, 5.0) == pytest.approx(11)
    assert bucket.level(20.0) == pytest.approx(5)
    assert bucket.wait_s(1000, 20.0) == pytest.approx(55)  # more than fits: until it is full
    bucket.correct(-1000, 20.0)
    assert bucket.level(20.0) == 60


@pytest.mark.parametrize(
    ("body", "tokens", "most"),
    [
        (b'{"model": "chat"}', 4, None),
        (b'{"max_tokens": 7}', 4, 7),
        (b'{"max_completion_tokens":12 }', 7, 12),
        (b'{"max_output_tokens" : 3}', 6, 3),
        (b'{"max_tokens": null, "content": "\\"max_tokens\\": 9"}', 12, None),
        (b'{"url": "data:image/png;base64,' + b"A" * 400_000 + b'"}', 1032, None),
        (b'{"max_tokens": 5, "max_other": 6}', 8, 5),
    ],
)
def test_a_requests_cost_is_guessed_from_its_bytes(
    body: bytes, tokens: int, most: int | None
) -> None:
    assert abs(prompt_tokens(body) - tokens) <= 2
    assert a_call(a_tenant(), body).max_tokens == most


def test_requests_per_minute_are_held_and_retry_after_is_true() -> None:
    now, tenant = [10.0], a_tenant(requests_per_minute=6)
    accounts = some_accounts(now)
    for _ in range(6):
        accounts.leave(accounts.enter(tenant, "chat", a_call(tenant)), a_record())

    with pytest.raises(RateLimited) as refused:
        accounts.enter(tenant, "chat", a_call(tenant))

    assert refused.value.retry_after_s == pytest.approx(10)
    assert refused.value.more_headers["x-ratelimit-limit-requests"] == "6"
    assert refused.value.more_headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.value.more_headers["x-ratelimit-reset-requests"] == "60.000s"
    now[0] += refused.value.retry_after_s - 0.01
    with pytest.raises(RateLimited):
        accounts.enter(tenant, "chat", a_call(tenant))
    now[0] += 0.02
    accounts.enter(tenant, "chat", a_call(tenant))


def test_tokens_per_minute_reserve_the_prediction_and_settle_with_the_truth() -> None:
    now, tenant = [10.0], a_tenant(tokens_per_minute=300)
    accounts = some_accounts(now)
    visits = [accounts.enter(tenant, "chat", a_call(tenant)) for _ in range(2)]
    assert [visit.reserved for visit in visits] == [109, 109]

    with pytest.raises(RateLimited, match="300 tokens per minute") as refused:
        accounts.enter(tenant, "chat", a_call(tenant))
    assert refused.value.retry_after_s == pytest.approx((109 - 82) / 5)

    for visit in visits:
        accounts.leave(visit, a_record(usage=Usage(10, 5)))
    for _ in range(2):  # 270 are left of 300
        accounts.enter(tenant, "chat", a_call(tenant))
    with pytest.raises(RateLimited):
        accounts.enter(tenant, "chat", a_call(tenant))


def test_without_max_tokens_the_answers_so_far_are_the_guess() -> None:
    tenant = a_tenant(tokens_per_minute=10_000)
    accounts = some_accounts([1.0])
    call = a_call(tenant, b'{"model": "chat"}')
    before = accounts.predicted(call, "chat")

    for _ in range(100):
        visit = accounts.enter(tenant, "chat", a_call(tenant, b'{"max_tokens": 1}'))
        accounts.leave(visit, a_record(usage=Usage(1, 20)))

    assert before == 256 + 4
    assert accounts.predicted(call, "chat") < 30


def test_a_budget_is_held_until_its_period_ends() -> None:
    wall = [NOON]
    tenant = a_tenant(budget_tokens=100, budget_period="day")
    accounts = some_accounts([1.0], wall)
    accounts.leave(accounts.enter(tenant, "chat", a_call(tenant)), a_record(usage=Usage(60, 50)))

    with pytest.raises(QuotaSpent, match="100 tokens of this day") as refused:
        accounts.enter(tenant, "chat", a_call(tenant))

    assert refused.value.retry_after_s == 12 * 3600
    wall[0] += refused.value.retry_after_s
    accounts.enter(tenant, "chat", a_call(tenant))


def test_a_budget_is_not_passed_by_asking_at_the_same_time() -> None:
    tenant = a_tenant(budget_tokens=100)
    accounts = some_accounts([1.0])
    accounts.enter(tenant, "chat", a_call(tenant))

    with pytest.raises(QuotaSpent) as refused:
        accounts.enter(tenant, "chat", a_call(tenant))

    assert refused.value.retry_after_s == 1  # what is only reserved may come back at any time


def test_periods_are_those_of_the_calendar() -> None:
    december = datetime(2027, 12, 31, 23, 59, tzinfo=UTC).timestamp()

    assert (period_of(NOON, "day"), period_of(NOON, "month")) == ("2026-11-22", "2026-11")
    assert period_end_s(december, "month") == datetime(2028, 1, 1, tzinfo=UTC).timestamp()
    assert period_end_s(december, "day") == datetime(2028, 1, 1, tzinfo=UTC).timestamp()
    assert period_end_s(NOON, "month") == datetime(2026, 12, 1, tzinfo=UTC).timestamp()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["enter", "leave", "twice", "wait", "change"]),
            st.integers(0, 400),
            st.floats(0, 30),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_whatever_happens_no_limit_is_passed_and_no_reservation_is_left(
    events: list[tuple[str, int, float]], shared: bool
) -> None:
    now, limit = [100.0], 3
    tenant = a_tenant(
        requests_per_minute=20, tokens_per_minute=1000, max_in_flight=limit, budget_tokens=5000
    )
    accounts = some_accounts(now)
    inside: list[Visit] = []
    refusals: list[LimitReached] = []
    entered: list[float] = []
    used = 0
    for event, number, seconds in events:
        if event == "enter":
            body = b'{"max_tokens": %d}' % number
            try:
                inside.append(accounts.enter(tenant, "chat", a_call(tenant, body)))
                entered.append(now[0])
            except LimitReached as error:
                refusals.append(error)
        elif event == "wait":
            now[0] += seconds
        elif event == "change" and shared:
            accounts.apply([tenant])
        elif inside:
            visit = inside.pop(number % len(inside))
            used += number
            accounts.leave(visit, a_record(usage=Usage(number, 0)))
            if event == "twice":
                accounts.leave(visit, a_record(usage=Usage(number, 0)))
        assert len(inside) <= limit
        if entered:
            [account] = accounts._accounts.values()
            assert account.in_flight == len(inside)
            assert account.reserved == sum(visit.reserved for visit in inside)
    assert all(error.retry_after_s > 0 for error in refusals)
    for at in entered:  # a bucket lets through what it holds and what fills it meanwhile
        assert sum(at <= other < at + 60 for other in entered) <= 40
    assert sum(row.prompt_tokens for row in accounts.ledger.take()) == used


def test_workers_count_together(tmp_path: Path) -> None:
    now = [10.0]
    tenant = a_tenant(requests_per_minute=5, max_in_flight=2)
    cells = [SharedCells(tmp_path / "limits") for _ in range(2)]
    one, two = (some_accounts(now, shared=each) for each in cells)
    other = a_tenant("other", max_in_flight=2)
    two.enter(other, "chat", a_call(other))

    visits = [one.enter(tenant, "chat", a_call(tenant)), two.enter(tenant, "chat", a_call(tenant))]
    with pytest.raises(RateLimited, match="2 requests at a time"):
        one.enter(tenant, "chat", a_call(tenant))
    for accounts, visit in zip((one, two), visits, strict=True):
        accounts.leave(visit, a_record())
    for _ in range(3):
        two.leave(two.enter(tenant, "chat", a_call(tenant)), a_record())
    with pytest.raises(RateLimited, match="5 requests per minute"):
        one.enter(tenant, "chat", a_call(tenant))

    for each in cells:
        each.close()


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


def stored(folder: Path, *columns: str) -> list[tuple[int, ...]]:
    with sqlite3.connect(folder / "keys.usage.sqlite") as database:
        rows = database.execute(f"SELECT {', '.join(columns)} FROM usage").fetchall()  # noqa: S608
    database.close()
    return rows


async def test_usage_is_what_the_engine_reported_and_is_written_within_a_second(
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
        await until(lambda: stored(tmp_path, "requests") == [(2,)], 1.5)
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


async def refusal(client: aiohttp.ClientSession) -> tuple[int, str, str]:
    async with client.post(CHAT, json=a_chat(), headers=bearer()) as response:
        error = (await response.json())["error"]
        return response.status, error["code"], response.headers["retry-after"]


async def test_what_exceeds_a_limit_is_429_by_http_and_grpc(tmp_path: Path) -> None:
    async with (
        an_engine() as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine)), a_tenant(requests_per_minute=1), grpc_port=0
        ) as gateway,
        a_client(gateway) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
    ):
        assert (await client.post(CHAT, json=a_chat(), headers=bearer())).status == 200
        status, code, retry_after = await refusal(client)
        assert (status, code) == (429, "rate_limit_exceeded")
        assert 58 <= int(retry_after) <= 60
        request = pb.ChatCompletionRequest(
            model="chat", messages=[pb.ChatMessage(role="user", content="hi")]
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference_pb2_grpc.InferenceStub(channel).ChatCompletion(
                request, metadata=list(bearer().items())
            )
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(refused.value.trailing_metadata())
        assert trailing["x-ratelimit-limit-requests"] == "1"
        assert 58 <= int(trailing["retry-after"]) <= 60
    assert len(engine.seen) == 1


async def test_a_spent_budget_outlives_the_gateway_and_can_be_raised(tmp_path: Path) -> None:
    tenant = a_tenant(budget_tokens=12)  # an answer is 10
    async with an_engine() as engine:
        table = a_table(an_endpoint(engine))
        async with (
            a_locked_gateway(tmp_path, table, tenant) as gateway,
            a_client(gateway) as client,
        ):
            for status in (200, 200, 429):
                response = await client.post(CHAT, json=a_chat(), headers=bearer())
                assert response.status == status
        async with (
            a_locked_gateway(tmp_path, table, tenant) as gateway,
            a_client(gateway) as client,
        ):
            assert (await refusal(client))[:2] == (429, "insufficient_quota")

            write_keys(tmp_path / "keys.yaml", a_tenant(budget_tokens=100))
            await until(lambda: gateway.access.ring.tenants["acme"].budget_tokens == 100)

            assert (await client.post(CHAT, json=a_chat(), headers=bearer())).status == 200


async def test_gateways_with_one_key_file_hold_a_budget_together(tmp_path: Path) -> None:
    tenant = a_tenant(budget_tokens=12)
    async with an_engine() as engine:
        table = a_table(an_endpoint(engine))
        async with (
            a_locked_gateway(tmp_path, table, tenant) as one,
            a_locked_gateway(tmp_path, table, tenant) as two,
            a_client(one) as to_one,
            a_client(two) as to_two,
        ):
            assert (await to_two.post(CHAT, json=a_chat(), headers=bearer())).status == 200
            assert (await to_one.post(CHAT, json=a_chat(), headers=bearer())).status == 200
            await until(lambda: stored(tmp_path, "requests") == [(2,)], 2)
            await asyncio.sleep(0.7)  # and read

            for client in (to_one, to_two):
                assert (await refusal(client))[1] == "insufficient_quota"


async def test_workers_of_one_gateway_hold_limits_and_write_usage_together(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", a_tenant(requests_per_minute=4))
    async with (
        an_engine() as engine,
        a_process(tmp_path, engine.url, "--workers", "2", "--keys", str(keys)) as (process, log),
    ):
        await until(lambda: len(ports(log)) == 2, 30)
        base = f"http://127.0.0.1:{ports(log)[0][0]}"
        connector = aiohttp.TCPConnector(force_close=True)  # so that both workers are asked
        async with aiohttp.ClientSession(base, connector=connector) as client:
            statuses = []
            for _ in range(16):
                async with client.post(CHAT, json=a_chat(), headers=bearer()) as response:
                    statuses.append(response.status)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0

    assert sorted(statuses) == [200] * 4 + [429] * 12
    assert stored(tmp_path, "requests", "prompt_tokens") == [(4, 4 * USAGE["prompt_tokens"])]
    assert "Traceback" not in "".join(log)


async def test_a_limit_is_not_evaded_and_a_ban_not_lifted_by_another_models_help(
    tmp_path: Path,
) -> None:
    async with an_engine() as small, an_engine() as large:
        table = a_table(
            an_endpoint("http://127.0.0.1:9", model="gone"),
            an_endpoint(small, model="small"),
            an_endpoint(large, model="large"),
            models=(
                ServedModel(name="gone", fallback=("large", "small")),
                ServedModel(name="small", fallback=("large",)),
                ServedModel(name="large"),
            ),
        )
        tenant = a_tenant(models=("gone", "small"), requests_per_minute=2)
        async with (
            a_locked_gateway(tmp_path, table, tenant) as gateway,
            a_client(gateway) as client,
        ):
            for model, status in (("gone", 200), ("small", 200), ("small", 429), ("gone", 429)):
                body = a_chat(model=model)
                response = await client.post(CHAT, json=body, headers=bearer())
                assert response.status == status
    assert large.seen == []
    assert stored(tmp_path, "model", "requests") == [("small", 2)]


async def test_who_cannot_be_served_in_its_time_is_told_at_once(tmp_path: Path) -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine, max_in_flight=1)), a_tenant()
        ) as gateway,
        a_client(gateway) as client,
    ):
        first = asyncio.ensure_future(client.post(CHAT, json=a_chat(), headers=bearer()))
        await until(lambda: engine.running == 1)
        await asyncio.sleep(0.3)
        second = asyncio.ensure_future(client.post(CHAT, json=a_chat(), headers=bearer()))
        await until(lambda: gateway.admission.queued("chat") == 1)
        engine.gate.set()
        await first
        await second
        engine.gate.clear()
        held = asyncio.ensure_future(client.post(CHAT, json=a_chat(), headers=bearer()))
        await until(lambda: engine.running == 1)

        hurried = {**bearer(), "x-request-timeout-s": "0.05"}
        async with client.post(CHAT, json=a_chat(), headers=hurried) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "deadline_out_of_reach"
            assert response.headers["retry-after"] == "1"
        engine.gate.set()
        assert (await held).status == 200
