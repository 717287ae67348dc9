from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import Admission
from gateway.call import make_call
from gateway.config import Limits
from gateway.errors import (
    EngineBroke,
    EngineUnreachable,
    NoSuchModel,
    Overloaded,
    Unavailable,
    WouldBeLate,
)
from gateway.load import LoadMeter
from gateway.record import Record
from tests.gateway.engines import PATIENCE_S, a_table, an_endpoint


async def test_nobody_overtakes_those_who_wait() -> None:
    admission = Admission()
    admission.apply(a_table(an_endpoint("http://a", max_in_flight=1)))
    first = admission.try_acquire("chat")
    second = asyncio.ensure_future(admission.wait("chat"))
    await asyncio.sleep(0)

    admission.release(first)

    assert admission.try_acquire("chat") is None
    assert (await second).endpoint.url == "http://a"


async def test_a_request_that_failed_elsewhere_goes_to_the_front() -> None:
    admission = Admission(Limits(max_queued=1))
    admission.apply(a_table(an_endpoint("http://a", max_in_flight=1), an_endpoint("http://b")))
    admission.apply(a_table(an_endpoint("http://a", max_in_flight=1), version=2))
    held = admission.try_acquire("chat")
    waiting = asyncio.ensure_future(admission.wait("chat"))
    await asyncio.sleep(0)
    again = asyncio.ensure_future(admission.wait("chat", {"http://b"}))
    await asyncio.sleep(0)

    admission.release(held)
    await asyncio.sleep(0.01)

    assert again.done()
    assert not waiting.done()
    admission.release(await again)
    admission.release(await waiting)
    assert admission.loads()["chat"].in_flight >= 0


async def test_a_place_granted_in_the_moment_of_cancellation_is_not_lost() -> None:
    admission = Admission()
    admission.apply(a_table(an_endpoint("http://a", max_in_flight=1)))
    held = admission.try_acquire("chat")
    waiting = asyncio.ensure_future(admission.wait("chat"))
    await asyncio.sleep(0)

    admission.release(held)  # grants
    waiting.cancel()  # before the waiter could run
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert admission.try_acquire("chat") is not None


async def test_a_waiter_goes_on_when_an_endpoint_is_trusted_again() -> None:
    admission = Admission(Limits(suspect_s=0.05))
    admission.apply(
        a_table(an_endpoint("http://a", max_in_flight=1), an_endpoint("http://b", max_in_flight=1))
    )
    first, _second = admission.try_acquire("chat"), admission.try_acquire("chat")
    admission.failed(first, EngineBroke("it hung up"))
    admission.release(first)
    assert admission.try_acquire("chat") is None  # the healthy one is full, the other suspect

    lease = await asyncio.wait_for(admission.wait("chat"), PATIENCE_S)

    assert lease.endpoint == first.endpoint


async def test_what_engines_answer_decides_who_is_asked_next() -> None:
    admission = Admission(Limits(breaker_failures=2))
    admission.apply(a_table(an_endpoint("http://a"), an_endpoint("http://b")))
    first = admission.try_acquire("chat")
    for status in (404, 429, 500, 500):
        assert first.state.breaker.closed
        admission.failed(first, status)
    admission.release(first)

    assert not first.state.breaker.closed
    leases = [admission.try_acquire("chat") for _ in range(5)]
    assert first.endpoint not in [lease.endpoint for lease in leases]


async def test_a_good_answer_clears_an_endpoint_of_suspicion() -> None:
    times = [0.0]
    admission = Admission(Limits(suspect_s=2), clock=lambda: times[0])
    admission.apply(a_table(an_endpoint("http://a")))
    bad = admission.try_acquire("chat")
    admission.failed(bad, EngineUnreachable("nobody listens"))
    admission.release(bad)
    times[0] = 2.5

    good = admission.try_acquire("chat")
    admission.release(good, Record("http", "/v1/chat/completions", "id", status=400))

    assert good.state.breaker.closed


async def test_retry_after_follows_the_pace_of_the_queue() -> None:
    now = [0.0]
    admission = Admission(Limits(max_queued=1), clock=lambda: now[0])
    admission.apply(a_table(an_endpoint("http://a", max_in_flight=2)))
    for _ in range(5):
        lease = admission.try_acquire("chat")
        now[0] += 8
        admission.release(lease)
    leases = [admission.try_acquire("chat"), admission.try_acquire("chat")]
    waiting = asyncio.ensure_future(admission.wait("chat"))
    await asyncio.sleep(0)

    with pytest.raises(Overloaded) as refused:
        await admission.wait("chat")

    assert refused.value.retry_after == "8"  # one is before it, and a place comes free every 4 s
    for lease in leases:
        admission.release(lease)
    admission.release(await waiting)


async def test_what_would_be_late_is_refused_at_once_and_told_when_to_return() -> None:
    now = [0.0]
    admission = Admission(clock=lambda: now[0])
    admission.apply(a_table(an_endpoint("http://a", max_in_flight=1)))
    lease = admission.try_acquire("chat")
    hurried = make_call("http", "/x", b'{"model": "chat"}', {"x-request-timeout-s": "5"}, "id")
    early = asyncio.ensure_future(admission.wait("chat", (), hurried))
    await asyncio.sleep(0)
    assert not early.done()  # nothing has ended yet, so nobody knows better
    now[0] += 8
    admission.release(lease)
    await asyncio.sleep(0)

    with pytest.raises(WouldBeLate, match="waits about 8") as refused:
        await admission.wait("chat", (), hurried)

    assert refused.value.retry_after == "3"
    admission.release(await early)


def test_load_is_averaged_over_the_time_since_the_last_report() -> None:
    now = [0.0]
    admission = Admission(clock=lambda: now[0])
    admission.apply(a_table(an_endpoint("http://a")))
    now[0] = 10.0
    admission.loads()
    lease = admission.try_acquire("chat")
    assert lease is not None
    now[0] = 13.0
    admission.release(lease)
    now[0] = 14.0

    load = admission.loads()["chat"]

    assert load.in_flight == pytest.approx(3 / 4)
    assert load.requests_total == 1
    now[0] = 15.0
    assert admission.loads()["chat"].in_flight == 0


def test_a_load_meter_averages_over_time_and_knows_its_pace() -> None:
    load = LoadMeter(0.0)
    load.began(0.0)
    load.began(5.0)
    assert load.wait_s(3, 2, 6.0) is None
    load.ended(10.0)
    load.ended(10.0)

    assert load.average(20.0) == pytest.approx((5 * 1 + 5 * 2) / 20)
    assert load.average(21.0) == 0
    assert load.average(21.0) == 0
    assert load.wait_s(3, 2, 20.0) == pytest.approx((3 + 1) / 2 * 7.5, rel=0.02)


def test_what_is_unknown_is_said_so() -> None:
    admission = Admission()
    with pytest.raises(Unavailable):
        admission.resolve("chat")

    admission.apply(a_table(an_endpoint("http://a")))

    with pytest.raises(NoSuchModel, match="known: chat"):
        admission.resolve("x")


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.lists(st.sampled_from(["finish", "cancel", "new"]), max_size=40),
    st.randoms(),
)
def test_whatever_happens_places_are_respected_and_come_back(
    places: list[int], events: list[str], random: Random
) -> None:
    asyncio.run(_live_through(places, events, random))


async def _live_through(places: list[int], events: list[str], random: Random) -> None:
    admission = Admission()
    admission.apply(
        a_table(*(an_endpoint(f"http://{n}", max_in_flight=p) for n, p in enumerate(places)))
    )
    total = sum(places)
    finish: dict[asyncio.Task[None], asyncio.Event] = {}
    running = most = 0

    async def request(done: asyncio.Event) -> None:
        nonlocal running, most
        lease = admission.try_acquire("chat") or await admission.wait("chat")
        running += 1
        most = max(most, running)
        try:
            await done.wait()
        finally:
            running -= 1
            admission.release(lease)

    for event in events:
        tasks = [task for task in finish if not task.done()]
        if event == "new":
            done = asyncio.Event()
            finish[asyncio.create_task(request(done))] = done
        elif tasks and event == "finish":
            finish[random.choice(tasks)].set()
        elif tasks:
            random.choice(tasks).cancel()
        if random.random() < 0.7:
            await asyncio.sleep(0)
    for done in finish.values():
        done.set()
    await asyncio.gather(*finish, return_exceptions=True)

    assert most <= total
    assert admission.queued("chat") == 0
    assert all(state.in_flight == 0 for state in admission.router._states.values())
    assert admission._lanes["chat"].load.in_flight == 0
