"""Endpoints that fail, push back, die or are slow: who is asked instead, and until when."""

from __future__ import annotations

from gateway.routing import EndpointState, Fault, Router
from tests.gateway.engines import a_table, an_endpoint
from tests.gateway.routers import a_record, a_router, some_endpoints, url_of


def test_an_endpoint_that_broke_off_is_the_last_choice_until_its_time_is_over() -> None:
    router = a_router(*some_endpoints(2, max_in_flight=2))
    bad = router.reserve("chat", now=0)
    router.failed(bad, Fault.BROKE, now=0)
    router.release(bad)

    others = [router.reserve("chat", now=1), router.reserve("chat", now=1)]

    assert bad.endpoint not in [lease.endpoint for lease in others]
    assert router.reserve("chat", now=1) is None  # waiting for the healthy one is better
    assert router.reserve("chat", now=2).endpoint == bad.endpoint


def test_where_nobody_listens_no_request_goes_until_one_tries_again() -> None:
    router = a_router(*some_endpoints(2))
    bad = router.reserve("chat", now=0)
    router.failed(bad, Fault.UNREACHABLE, now=0)
    router.release(bad)

    assert {router.reserve("chat", now=1).endpoint == bad.endpoint for _ in range(9)} == {False}
    after = [router.reserve("chat", now=3) for _ in range(9)]
    assert [lease.endpoint for lease in after].count(bad.endpoint) == 1
    probe = next(lease for lease in after if lease.endpoint == bad.endpoint)
    router.release(probe, now=4, record=a_record())
    more = [router.reserve("chat", now=4) for _ in range(9)]
    assert [lease.endpoint for lease in more].count(bad.endpoint) > 1


def test_when_every_endpoint_has_failed_requests_still_try_the_one_whose_time_ends_first() -> None:
    router = a_router(*some_endpoints(3))
    failed = []
    for now in (0.0, 0.1, 0.2):
        lease = router.reserve("chat", now=now)
        router.failed(lease, Fault.UNREACHABLE, now=now)
        router.release(lease)
        failed.append(lease.endpoint)

    assert len(set(map(str, failed))) == 3
    assert router.reserve("chat", now=0.3).endpoint == failed[0]


def test_an_endpoint_that_pushes_back_gets_less_but_has_not_failed() -> None:
    router = a_router(*some_endpoints(2))
    busy = router.reserve("chat", now=0)
    for _ in range(10):
        router.failed(busy, Fault.BUSY, now=0)
    router.release(busy)

    soon = [router.reserve("chat", now=0.5).endpoint for _ in range(10)]

    assert 0 < soon.count(busy.endpoint) < 4
    assert busy.state.breaker.closed


def test_errors_of_clients_open_no_breaker() -> None:
    router = a_router(*some_endpoints(1))
    for _ in range(100):
        lease = router.reserve("chat", now=0)
        router.release(lease, now=0, record=a_record(400))

    assert lease.state.breaker.closed


def test_an_endpoint_that_moved_is_no_longer_suspect() -> None:
    router = Router()
    router.apply(a_table(an_endpoint("http://a", id="r"), an_endpoint("http://b", id="s")))
    lease = router.reserve("chat", now=0)
    router.failed(lease, Fault.UNREACHABLE, now=0)
    router.release(lease)
    moved = lease.endpoint.model_copy(update={"url": "http://new"})

    router.apply(a_table(moved))

    assert router.reserve("chat", now=1).state.breaker.closed


def test_a_dead_endpoint_gets_nothing_until_a_check_passes() -> None:
    router = a_router(*some_endpoints(2))
    for now in range(3):
        died = router.check_failed("http://0", now=now, enough=3)

    assert [state.endpoint.url for state in died] == ["http://0"]
    assert router.num_ready("chat") == 1
    assert {url_of(router.reserve("chat", now=4)) for _ in range(5)} == {"http://1"}
    assert router.check_failed("http://0", now=5, enough=3) == []  # told once
    assert [s.endpoint.url for s in router.check_passed("http://0", now=6)] == ["http://0"]
    assert "http://0" in {url_of(router.reserve("chat", now=7)) for _ in range(9)}


def test_after_one_failed_check_requests_go_elsewhere_for_a_while() -> None:
    router = a_router(*some_endpoints(2))
    router.check_failed("http://0", now=0, enough=4)

    assert {url_of(router.reserve("chat", now=1)) for _ in range(5)} == {"http://1"}
    assert router.num_ready("chat") == 2  # it is not dead
    assert "http://0" in {url_of(router.reserve("chat", now=5)) for _ in range(9)}


def test_when_every_check_fails_the_load_still_goes_everywhere() -> None:
    router = a_router(*some_endpoints(2))
    for now in range(3):
        for url in ("http://0", "http://1"):
            router.check_failed(url, now=now, enough=9)

    used = {url_of(router.reserve("chat", now=3.6)) for _ in range(9)}
    assert used == {"http://0", "http://1"}


def test_where_nobody_replaces_the_dead_they_are_asked_all_the_same() -> None:
    alone, managed = a_router(*some_endpoints(2)), a_router(*some_endpoints(2), managed=True)
    for router in (alone, managed):
        for url in ("http://0", "http://1"):
            router.check_failed(url, now=0, enough=1)
        assert router.num_ready("chat") == 0

    assert managed.reserve("chat", now=1) is None
    assert not managed.can_serve("chat")
    lease = alone.reserve("chat", now=1)
    # and given up with the next check that fails
    assert alone.check_failed(url_of(lease), now=2, enough=1) == [lease.state]


def test_a_passed_check_says_nothing_of_requests_that_break_off() -> None:
    router = a_router(*some_endpoints(1))
    lease = router.reserve("chat", now=0)
    for fault, open_after in ((Fault.BROKE, True), (Fault.UNREACHABLE, False)):
        for _ in range(3):
            router.failed(lease, fault, now=0)
        assert not lease.state.breaker.closed

        router.check_passed("http://0", now=0.5)

        assert lease.state.breaker.closed is not open_after
        lease.state.breaker.close()


def test_requests_that_succeed_keep_an_endpoint_alive_whose_checks_fail() -> None:
    router = a_router(*some_endpoints(1))
    for now in range(20):
        router.check_failed("http://0", now=now, enough=3)
        lease = router.reserve("chat", now=now)
        router.release(lease, now=now, record=a_record())

    assert router.num_ready("chat") == 1


def test_a_far_slower_endpoint_is_left_alone_for_a_while_then_tried_once() -> None:
    router = a_router(*some_endpoints(4), routing={"policy": "round_robin"})
    slow: EndpointState | None = None
    now = 0.0
    for _ in range(80):
        lease = router.reserve("chat", now=now)
        slow = slow or lease.state
        now += 0.1
        lease.since = now - (8.0 if lease.state is slow else 1.0)
        router.release(lease, now=now, record=a_record())
        if slow.breaker.is_slow:
            break

    assert slow.breaker.state(now) == "open"
    assert slow.ejections == 1
    during = [router.reserve("chat", now=now + 1) for _ in range(12)]
    assert slow not in [lease.state for lease in during]
    after = [router.reserve("chat", now=now + 11) for _ in range(12)]
    assert [lease.state for lease in after].count(slow) == 1


def test_an_endpoint_that_turns_out_slow_gets_less() -> None:
    router = a_router(*some_endpoints(2))
    slow = None
    now = 0.0
    for _ in range(60):
        lease = router.reserve("chat", now=now)
        slow = slow or lease.endpoint
        now += 0.1
        lease.since = now - (3.0 if lease.endpoint == slow else 1.0)
        router.release(lease, now=now, record=a_record())

    endpoints = [router.reserve("chat", now=now).endpoint for _ in range(100)]

    assert 20 <= endpoints.count(slow) <= 35
