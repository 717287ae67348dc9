from __future__ import annotations

import pytest

from gateway.retry_budget import RetryBudget
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    metric,
    some_engines,
)


@pytest.mark.parametrize("rate", [10, 1000])
def test_under_lasting_overload_retries_are_a_share_of_requests_and_a_floor(rate: int) -> None:
    budget = RetryBudget(0.2, 2.0, now=0.0)
    num_requests = 60 * rate

    granted = sum(budget.take(number, number / rate) for number in range(1, num_requests + 1))

    assert granted == pytest.approx(0.2 * num_requests + 2.0 * 60 + 20, rel=0.02, abs=2)


def test_a_model_that_is_asked_rarely_may_retry_each_time() -> None:
    budget = RetryBudget(0.2, 1.0, now=0.0)

    assert all(budget.take(number, 5.0 * number) for number in range(1, 100))


def test_what_is_saved_in_quiet_hours_is_no_licence_for_a_storm() -> None:
    budget = RetryBudget(0.2, 2.0, now=0.0)

    granted = sum(budget.take(1_000_000, 3600.0) for _ in range(1000))

    assert granted == 20


def test_without_a_budget_there_are_no_retries() -> None:
    budget = RetryBudget(0.0, 0.0, now=0.0)

    assert not any(budget.take(number, float(number)) for number in range(100))


async def test_an_overloaded_fleet_is_asked_only_as_often_as_the_budget_allows() -> None:
    limits = {"retry_share": 0.25, "retries_per_s": 0.0, "breaker_failures": 1000}
    async with (
        some_engines(2, status=503) as engines,
        a_gateway(a_table(*map(an_endpoint, engines)), limits=limits) as gateway,
        a_client(gateway) as client,
    ):
        for _ in range(40):
            async with client.post(CHAT, json=a_chat()) as response:
                assert response.status == 503

        assert sum(len(engine.seen) for engine in engines) == 50
        assert await metric(client, "bora_gateway_retries_total", reason="503") == 10
