"""What samples of a gateway's console tell about a death."""

from __future__ import annotations

from loadtests.steady_streams import Capacity, SteadyStreams


def a_load(*samples: Capacity) -> SteadyStreams:
    return SteadyStreams("http://127.0.0.1:1", "chat", samples=list(samples))


def at(second: float, *usable: str, ready: int | None = 2, **requests: int) -> Capacity:
    return Capacity(second, ready, usable, requests)


def test_the_last_request_to_an_endpoint_is_when_its_count_last_grew():
    load = a_load(at(0, a=1), at(1, a=5), at(2, a=9), at(3, a=9), at(4, b=1))

    assert load.last_sent("a", since_s=0.5) == 1.5
    assert load.last_sent("a", since_s=2.5) == 0


def test_full_is_from_when_on_nothing_was_missing():
    load = a_load(at(0, "a", "b"), at(1, "b"), at(2, "b", "c"), at(4, "b", "c"))

    assert load.full_since(2, 0.0) == 2


def test_full_is_not_known_before_it_has_lasted():
    load = a_load(at(0, "a", "b"), at(1, "b"), at(2, "b", "c"), at(3, "b", "c"))

    assert load.full_since(2, 0.0) is None


def test_an_endpoint_that_must_be_gone_does_not_count():
    load = a_load(at(0, "a", "b"), at(2, "a", "b"))

    assert load.full_since(2, 0.0, without="a") is None
    assert load.full_since(2, 0.0) == 0


def test_a_gateway_that_does_not_answer_has_no_capacity():
    load = a_load(at(0, "a", "b"), at(1, ready=None), at(2, "a", "b"), at(4, "a", "b"))

    assert load.least_ready() == 0
    assert load.full_since(2, 0.0) == 2
