"""Limits and budgets of tenants: buckets, predictions and accounts, without sockets."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.accounts import Visit
from gateway.errors import LimitReached, QuotaSpent, RateLimited
from gateway.ledger import period_end_s, period_of
from gateway.prediction import prompt_tokens
from gateway.shared_cells import SharedCells
from gateway.token_bucket import TokenBucket
from gateway.usage import Usage
from tests.gateway.accounting import NOON, a_call, a_record, some_accounts
from tests.gateway.tenants import a_tenant


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
