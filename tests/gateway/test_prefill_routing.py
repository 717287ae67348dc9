"""Where a prompt is read whose answer another endpoint writes, and when that pays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.call import Call
from gateway.endpoints import Endpoint
from gateway.routing import EndpointState, Fault, Lease, Router
from tests.gateway.engines import CHAT, a_table, an_endpoint


def a_router(*endpoints: Endpoint) -> Router:
    router = Router()
    router.apply(a_table(*endpoints))
    return router


def a_reader(number: int = 0, **changes: Any) -> Endpoint:
    return an_endpoint(f"http://p{number}:1", id=f"p{number}", role="prefill", **changes)


def a_writer(number: int = 0, **changes: Any) -> Endpoint:
    return an_endpoint(f"http://d{number}:1", id=f"d{number}", role="decode", **changes)


def a_prompt(text: str = "The bora blows. ", times: int = 200) -> Call:
    body = {"model": "chat", "messages": [{"role": "user", "content": text * times}]}
    return Call("http", CHAT, "chat", json.dumps(body).encode(), "id")


def write(router: Router, call: Call) -> Lease:
    lease = router.reserve("chat", now=0.0, call=call)
    assert lease is not None
    return lease


def read(router: Router, writer: Lease, call: Call, least_tokens: int = 100) -> Lease | None:
    return router.reserve_to_read(writer, call, least_tokens=least_tokens, now=0.0)


def state_of(router: Router, key: str) -> EndpointState:
    return router._states["chat", key]


@pytest.mark.parametrize("num_writers", [1, 2])
def test_it_pays_from_so_many_tokens_on_that_are_not_cached(num_writers: int) -> None:
    router = a_router(a_reader(), *map(a_writer, range(num_writers)))
    call = a_prompt()
    writer = write(router, call)

    assert read(router, writer, call, least_tokens=10_000) is None
    reader = read(router, writer, call)
    assert reader is not None
    assert reader.endpoint.key == "p0"
    router.release(reader)
    router.release(writer)

    again = write(router, call)
    assert again.endpoint.key == writer.endpoint.key
    assert read(router, again, call) is None


def test_a_prompt_goes_to_the_prefill_endpoint_that_knows_its_beginning() -> None:
    router = a_router(a_reader(0), a_reader(1), *map(a_writer, range(4)))
    call = a_prompt()
    first = read(router, write(router, call), call)
    assert first is not None
    router.release(first)

    longer = a_prompt(times=400)
    for number in range(4):  # wherever it is answered
        writer = Lease(state_of(router, f"d{number}"), a_writer(number))
        writer.state.work += 10_000
        again = read(router, writer, longer)
        assert again is not None
        assert again.endpoint.key == first.endpoint.key
        router.release(again)


def test_other_prompts_are_spread_over_prefill_endpoints() -> None:
    router = a_router(a_reader(0), a_reader(1), a_writer())
    keys = set()
    for text in ("One thing. ", "Another thing. "):
        call = a_prompt(text)
        reader = read(router, write(router, call), call)
        assert reader is not None
        keys.add(reader.endpoint.key)

    assert keys == {"p0", "p1"}


def test_it_does_not_pay_to_wait_longer_than_reading_would_hold_others_up() -> None:
    router = a_router(a_reader(), a_writer())
    call = a_prompt()
    writer = write(router, call)
    state_of(router, "p0").work += 1_000_000

    assert read(router, writer, call) is None


def test_an_endpoint_without_a_place_or_without_trust_reads_nothing() -> None:
    router = a_router(a_reader(0, max_in_flight=1), a_reader(1), a_writer(max_in_flight=9))
    call = a_prompt("One. ")
    full = read(router, write(router, call), call)
    assert full is not None
    other = "p1" if full.endpoint.key == "p0" else "p0"
    failing = Lease(state_of(router, other), full.endpoint)
    router.failed(failing, Fault.UNREACHABLE, now=0.0)
    state_of(router, full.endpoint.key).max_in_flight = 1

    call = a_prompt("Two. ", 1000)
    assert read(router, write(router, call), call) is None


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.BROKE, Fault.UNREACHABLE])
def test_an_endpoint_that_failed_a_moment_ago_reads_nothing(fault: Fault) -> None:
    router = a_router(a_reader(), a_writer())
    call = a_prompt()
    writer = write(router, call)
    failing = read(router, writer, call)
    assert failing is not None
    router.failed(failing, fault, now=0.0)
    router.release(failing)

    assert router.reserve_to_read(writer, call, least_tokens=100, now=0.5) is None
    assert router.reserve_to_read(writer, call, least_tokens=100, now=5.0) is not None


def test_a_prefill_endpoint_that_is_well_again_is_trusted_again() -> None:
    router = a_router(a_reader(), a_writer(max_in_flight=9))
    call = a_prompt("One. ", 1000)
    writer = write(router, call)
    reader = read(router, writer, call)
    assert reader is not None
    router.failed(reader, Fault.UNREACHABLE, now=0.0)
    router.release(reader)

    reader = router.reserve_to_read(writer, call, least_tokens=100, now=10.0)
    assert reader is not None
    assert reader.is_probe
    router.prompt_read(reader, writer, now=10.0)
    router.release(reader, now=10.0)

    assert state_of(router, "p0").breaker.closed


def test_what_was_read_elsewhere_is_no_work_of_the_one_that_answers() -> None:
    router = a_router(a_reader(), a_writer(0), a_writer(1))
    call = a_prompt()
    writer = write(router, call)
    before = writer.work
    reader = read(router, writer, call)
    assert reader is not None

    router.prompt_read(reader, writer, now=5.0)

    assert before - writer.work == pytest.approx(800, rel=0.1)
    assert writer.state.work == writer.work
    assert writer.since == 5.0
    router.release(reader)
    router.release(writer)
    assert [each.tokens_in_flight for each in router.snapshot(0.0)] == [0, 0, 0]


def test_whole_requests_never_go_to_a_prefill_endpoint_beside_another_one() -> None:
    router = a_router(a_reader(max_in_flight=1000), a_writer(max_in_flight=4))

    leases = [router.reserve("chat", now=0.0, call=a_prompt(f"{n}: ", 300)) for n in range(6)]

    assert [lease.endpoint.key for lease in leases if lease] == ["d0"] * 4
    assert router.places("chat") == (0, 4)
    assert router.num_ready("chat") == 1


@pytest.mark.parametrize("gone", ["taken out", "dead"])
def test_whole_requests_go_to_prefill_endpoints_when_only_these_are_left(gone: str) -> None:
    router = a_router(a_reader(), a_writer())
    if gone == "taken out":
        router.apply(a_table(a_reader()))
    else:
        router.check_failed("http://d0:1", now=0.0, enough=1)

    lease = write(router, a_prompt())

    assert lease.endpoint.key == "p0"
    assert router.can_serve("chat")


def test_who_failed_a_request_leaves_it_to_a_prefill_endpoint() -> None:
    router = a_router(a_reader(), a_writer())

    lease = router.reserve("chat", now=0.0, tried={"d0"}, call=a_prompt())

    assert lease is not None
    assert lease.endpoint.key == "p0"
    assert router.can_serve("chat", {"d0"})
    assert not router.can_serve("chat", {"d0", "p0"})


def test_prompts_are_at_home_only_where_answers_are_written() -> None:
    router = a_router(*map(a_reader, range(3)), *map(a_writer, range(3)))
    route = router._routes["chat"]

    homes = [route.home(key * 7919) for key in range(200)]

    assert {home.endpoint.key for home in homes if home} == {"d0", "d1", "d2"}
