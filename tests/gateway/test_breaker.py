from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest, EngineBroke, EngineUnreachable
from gateway.routing import Breaker, BreakerRules, Fault, fault_of

RULES = BreakerRules(failures=3, open_s=2.0, max_open_s=30.0)


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        (EngineUnreachable("no"), Fault.UNREACHABLE),
        (EngineBroke("no"), Fault.BROKE),
        (500, Fault.ERROR),
        (502, Fault.ERROR),
        (504, Fault.ERROR),
        (503, Fault.BUSY),
        (429, Fault.BUSY),
        (200, None),
        (400, None),
        (404, None),
        (499, None),
    ],
)
def test_what_is_an_endpoints_fault(reason: EngineBroke | int, fault: Fault | None) -> None:
    assert fault_of(reason) is fault


def test_a_refused_connection_opens_at_once() -> None:
    breaker = Breaker(RULES)

    assert breaker.failed(Fault.UNREACHABLE, 0.0)

    assert [breaker.state(now) for now in (0.0, 1.9, 2.0)] == ["open", "open", "half_open"]


def test_other_failures_open_after_some_in_a_row() -> None:
    breaker = Breaker(RULES)

    assert [breaker.failed(Fault.ERROR, n) for n in range(3)] == [False, False, True]


def test_a_success_between_starts_the_row_anew() -> None:
    breaker = Breaker(RULES)
    for now in range(4):
        assert not breaker.failed(Fault.ERROR, now)
        breaker.succeeded()


def test_half_of_the_last_requests_failing_opens_even_without_a_row() -> None:
    breaker = Breaker(RULES)
    for now in range(20):
        breaker.failed(Fault.ERROR, now)
        if not breaker.closed:
            break
        breaker.succeeded()

    assert not breaker.closed


def test_back_pressure_never_opens() -> None:
    breaker = Breaker(RULES)

    assert not any(breaker.failed(Fault.BUSY, now) for now in range(100))
    assert breaker.closed


def test_each_time_it_opens_again_it_stays_open_twice_as_long_up_to_a_limit() -> None:
    breaker = Breaker(RULES)
    now, waits = 0.0, []
    for _ in range(6):
        assert breaker.failed(Fault.BROKE if waits else Fault.UNREACHABLE, now)
        waits.append(breaker.open_until - now)
        now = breaker.open_until

    assert waits == [2, 4, 8, 16, 30, 30]


def test_failures_of_those_who_were_under_way_do_not_prolong_it() -> None:
    breaker = Breaker(RULES)
    breaker.failed(Fault.UNREACHABLE, 0.0)

    for _ in range(10):
        assert not breaker.failed(Fault.BROKE, 1.0)

    assert breaker.open_until == 2.0


def test_half_open_lets_one_through_whose_success_closes_it_and_forgets_the_past() -> None:
    breaker = Breaker(RULES)
    breaker.failed(Fault.UNREACHABLE, 0.0)

    assert not breaker.admits(1.0)
    assert breaker.admits(2.0)
    breaker.probing = True
    assert not breaker.admits(2.5)
    assert breaker.succeeded()
    assert breaker.admits(2.5)
    breaker.failed(Fault.UNREACHABLE, 3.0)
    assert breaker.open_until == 5.0


@given(st.lists(st.tuples(st.sampled_from([*Fault, None]), st.floats(0, 40)), max_size=60))
def test_it_always_opens_for_a_bounded_time_and_lets_somebody_try_after_it(
    results: list[tuple[Fault | None, float]],
) -> None:
    breaker, now = Breaker(RULES), 0.0
    for fault, later in results:
        now += later
        if fault is None:
            breaker.succeeded()
            assert breaker.closed
        else:
            breaker.failed(fault, now)
        assert breaker.open_until <= now + RULES.max_open_s
        assert breaker.admits(now + RULES.max_open_s)


def test_faults_are_only_those_of_endpoints() -> None:
    assert fault_of(BadRequest("x").status) is None
