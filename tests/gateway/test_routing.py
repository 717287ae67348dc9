"""The endpoint table in force, and how load spreads over it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.endpoints import Endpoint, EndpointTable, ServedModel
from gateway.routing import Fault, Router
from tests.gateway.engines import a_table, an_endpoint
from tests.gateway.routers import a_call, a_long_text, a_router, some_endpoints, url_of

# The table


_TABLES = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from("123"), st.sampled_from(["ready", "draining"])
        ),
        max_size=5,
    ),
    min_size=1,
    max_size=5,
)


@given(_TABLES)
def test_a_router_that_saw_other_tables_serves_by_the_last(
    tables: list[list[tuple[str, str, str]]],
) -> None:
    def endpoints(rows: list[tuple[str, str, str]]) -> list[Endpoint]:
        return [an_endpoint(f"http://{at}", model=name, state=state) for name, at, state in rows]

    router, anew = Router(), Router()
    for rows in tables:
        router.apply(a_table(*endpoints(rows)))
    anew.apply(a_table(*endpoints(tables[-1])))

    assert router.snapshot(0) == anew.snapshot(0)
    assert router.urls() == anew.urls()
    assert router.models == anew.models


def test_a_table_leaves_models_alone_of_which_it_tells_nothing_new() -> None:
    chat = some_endpoints(2)
    router = Router()
    router.apply(a_table(*chat, an_endpoint("http://x", model="code")))
    router.reserve("chat", now=0)
    [route] = [each for each in router._routes.values() if each.model.name == "chat"]
    assert route.is_clear

    router.apply(a_table(*chat, an_endpoint("http://y", model="code")))
    assert route.is_clear

    router.apply(a_table(*chat, an_endpoint("http://z")))
    assert not route.is_clear


def test_a_name_wins_over_another_models_alias() -> None:
    router = Router()
    router.apply(
        EndpointTable(models=(ServedModel(name="a", aliases=("b", "c")), ServedModel(name="b")))
    )

    assert router.resolve("b").name == "b"
    assert router.resolve("c").name == "a"
    assert router.resolve("d") is None


def test_an_endpoint_whose_model_is_not_listed_is_served_all_the_same() -> None:
    router = Router()
    router.apply(EndpointTable(endpoints=(an_endpoint("http://a"),)))

    assert router.resolve("chat").name == "chat"


def test_a_lease_is_released_once() -> None:
    router = Router()
    router.apply(a_table(an_endpoint("http://a")))
    lease = router.reserve("chat", now=0)

    assert [router.release(lease), router.release(lease)] == [True, False]
    assert lease.state.in_flight == 0


def test_a_snapshot_tells_of_every_endpoint() -> None:
    router = a_router(an_endpoint("http://a", variant="v", engine="vllm"), an_endpoint("http://b"))
    lease = router.reserve("chat", now=0, call=a_call(a_long_text(1)))
    router.failed(lease, Fault.UNREACHABLE, now=0)

    told = {each.url: each for each in router.snapshot(1.0)}

    mine = told[lease.endpoint.url]
    assert (mine.breaker, mine.in_flight, mine.state) == ("open", 1, "ready")
    assert mine.tokens_in_flight == lease.work > 0
    assert told["http://a"].engine == "vllm"
    assert sum(each.in_flight for each in told.values()) == 1


# Load


@pytest.mark.parametrize("policy", ["auto", "least_load"])
def test_places_are_filled_evenly_whatever_their_number(policy: str) -> None:
    router = a_router(
        an_endpoint("http://small", max_in_flight=4),
        an_endpoint("http://large", max_in_flight=12),
        routing={"policy": policy},
    )

    urls = [url_of(router.reserve("chat", now=0)) for _ in range(8)]

    assert urls.count("http://small") == 2


def test_an_idle_model_uses_its_endpoints_in_turn() -> None:
    router = a_router(*some_endpoints(3))
    urls = []
    for _ in range(6):
        lease = router.reserve("chat", now=0, call=a_call())
        urls.append(url_of(lease))
        router.release(lease)

    assert [urls.count(f"http://{n}") for n in range(3)] == [2, 2, 2]


def test_a_replica_that_is_planned_to_be_three_times_as_fast_gets_three_times_the_work() -> None:
    router = a_router(
        an_endpoint("http://slow", tokens_per_s=500), an_endpoint("http://fast", tokens_per_s=1500)
    )

    urls = [url_of(router.reserve("chat", now=0, call=a_call())) for _ in range(80)]

    assert urls.count("http://fast") == pytest.approx(60, abs=1)


def test_work_counts_rather_than_requests() -> None:
    router = a_router(*some_endpoints(2))
    long = router.reserve("chat", now=0, call=a_call("word " * 5000))

    short = [router.reserve("chat", now=0, call=a_call(max_tokens=8)) for _ in range(10)]

    assert url_of(long) not in map(url_of, short)


def test_full_draining_and_tried_endpoints_are_left_out() -> None:
    router = a_router(
        an_endpoint("http://full", max_in_flight=1),
        an_endpoint("http://draining", state="draining"),
        an_endpoint("http://tried"),
    )
    while url_of(router.reserve("chat", now=0)) != "http://full":
        pass

    assert router.reserve("chat", now=0, tried={"http://tried"}) is None


def test_workers_share_the_places_of_an_endpoint() -> None:
    router = Router(workers=4)
    router.apply(a_table(an_endpoint("http://a", max_in_flight=6)))

    assert [bool(router.reserve("chat", now=0)) for _ in range(3)] == [True, True, False]


def test_of_very_many_endpoints_all_are_used() -> None:
    router = a_router(*some_endpoints(100))

    leases = [router.reserve("chat", now=0, call=a_call()) for _ in range(1000)]

    in_flight = [state.in_flight for state in {lease.state for lease in leases}]
    assert len(in_flight) == 100
    assert max(in_flight) <= 20
