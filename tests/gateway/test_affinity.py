"""Where conversations, prompts and sessions go: to who has seen them, as long as that is not overloaded."""

from __future__ import annotations

import pytest

from tests.gateway.engines import a_table, an_endpoint
from tests.gateway.routers import a_call, a_long_text, a_router, some_endpoints


@pytest.mark.parametrize("policy", ["auto", "prefix"])
def test_a_conversation_goes_on_where_its_beginning_is_cached(policy: str) -> None:
    router = a_router(*some_endpoints(5), routing={"policy": policy})
    for seed in range(10):
        text = a_long_text(seed)
        first = router.reserve("chat", now=0, call=a_call(text))
        router.release(first)

        again = router.reserve("chat", now=1, call=a_call(text + " and " + a_long_text(99, 200)))

        assert again.endpoint == first.endpoint
        router.release(again)


@pytest.mark.parametrize("policy", ["auto", "prefix"])
def test_one_hot_prompt_does_not_overload_one_endpoint(policy: str) -> None:
    router = a_router(*some_endpoints(8), routing={"policy": policy})
    system = a_long_text(1)

    leases = [router.reserve("chat", now=0, call=a_call(f"{system} {n}")) for n in range(160)]

    in_flight = [state.in_flight for state in {lease.state for lease in leases}]
    assert max(in_flight) <= 1.5 * 160 / 8


@pytest.mark.parametrize("policy", ["auto", "session"])
def test_gateways_that_share_nothing_agree_where_a_session_lives(policy: str) -> None:
    endpoints = some_endpoints(6)
    one = a_router(*endpoints, seed=1, routing={"policy": policy})
    other = a_router(*endpoints[::-1], seed=2, routing={"policy": policy})
    for n in range(30):
        call = a_call(session=f"s{n}")
        leases = [router.reserve("chat", now=0, call=call) for router in (one, other)]

        assert leases[0].endpoint == leases[1].endpoint
        one.release(leases[0])
        other.release(leases[1])


def test_gateways_that_share_nothing_agree_where_a_new_prompt_lives() -> None:
    endpoints = some_endpoints(6)
    agreed = 0
    one, other = a_router(*endpoints), a_router(*endpoints[::-1])
    for seed in range(40):
        call = a_call(a_long_text(seed))
        leases = [router.reserve("chat", now=0, call=call) for router in (one, other)]
        agreed += leases[0].endpoint == leases[1].endpoint
        one.release(leases[0])
        other.release(leases[1])

    assert agreed == 40


def test_a_session_moves_on_when_its_home_is_overloaded() -> None:
    router = a_router(*some_endpoints(4, max_in_flight=64))

    leases = [router.reserve("chat", now=0, call=a_call(session="hot")) for _ in range(100)]

    in_flight = sorted(state.in_flight for state in {lease.state for lease in leases})
    assert len(in_flight) == 4
    assert in_flight[-1] < 45


def test_an_engine_that_was_replaced_is_not_taken_to_hold_anything() -> None:
    router = a_router(an_endpoint("http://a", id="r"), an_endpoint("http://b", id="s"))
    lease = router.reserve("chat", now=0, call=a_call(a_long_text(1)))
    router.release(lease)
    before = len(router._routes["chat"].index)
    moved = lease.endpoint.model_copy(update={"url": "http://new"})
    other = next(s.endpoint for s in router._states.values() if s.endpoint != lease.endpoint)

    router.apply(a_table(moved, other))

    assert before > 0
    assert len(router._routes["chat"].index) == 0


def test_sessions_and_conversations_stay_together_among_very_many_endpoints() -> None:
    router = a_router(*some_endpoints(40))
    for n in range(20):
        text = a_long_text(n)
        calls = [
            (a_call(session=f"s{n}"), a_call(session=f"s{n}")),
            (a_call(text), a_call(text + "more")),
        ]
        for first, second in calls:
            one = router.reserve("chat", now=0, call=first)
            router.release(one)
            other = router.reserve("chat", now=0, call=second)
            router.release(other)
            assert one.endpoint == other.endpoint
