from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from gateway.endpoints import EndpointTable, ServedModel
from gateway.routing import EndpointState, Lease, Router, pick
from tests.gateway.engines import a_table, an_endpoint


def a_state(name: str = "a", **changes: object) -> EndpointState:
    endpoint = an_endpoint(f"http://{name}", state=changes.pop("state", "ready"))
    return EndpointState(endpoint, **{"max_in_flight": 4, **changes})


def test_the_least_loaded_share_wins_not_the_smallest_number() -> None:
    small = a_state("small", in_flight=2, max_in_flight=4)
    large = a_state("large", in_flight=30, max_in_flight=100)

    assert pick([small, large], now=0) is large


def test_between_equals_the_one_with_fewer_requests_so_far_wins() -> None:
    assert pick([a_state("a", requests=3), b := a_state("b", requests=2)], now=0) is b


def test_full_draining_and_tried_endpoints_are_left_out() -> None:
    full = a_state("full", in_flight=4)
    draining = a_state("draining", state="draining")
    tried = a_state("tried")

    assert pick([full, draining, tried], now=0, tried={"http://tried"}) is None


def test_a_suspect_is_the_last_choice_until_its_time_is_over() -> None:
    suspect, busy = a_state("suspect", suspect_until=2.0), a_state("busy", in_flight=3)
    full = a_state("full", in_flight=4)

    assert pick([suspect, busy], now=1) is busy
    assert pick([suspect, busy], now=2) is suspect
    assert pick([suspect], now=1) is suspect
    assert pick([suspect, full], now=1) is None  # waiting for the healthy one is better


def test_workers_share_the_places_of_an_endpoint() -> None:
    router = Router(workers=4)
    router.apply(a_table(an_endpoint("http://a", max_in_flight=6)))

    assert [bool(router.reserve("chat", now=0)) for _ in range(3)] == [True, True, False]


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


def test_an_endpoint_that_moved_is_no_longer_suspect() -> None:
    router = Router()
    router.apply(a_table(an_endpoint("http://a", id="r"), an_endpoint("http://b", id="s")))
    lease = router.reserve("chat", now=0)
    router.suspect(lease, until=10)
    router.release(lease)
    moved = lease.endpoint.model_copy(update={"url": "http://new"})

    router.apply(a_table(moved))

    assert router.reserve("chat", now=1).state.suspect_until < 0


def test_a_lease_is_released_once() -> None:
    router = Router()
    router.apply(a_table(an_endpoint("http://a")))
    lease = router.reserve("chat", now=0)

    assert [router.release(lease), router.release(lease)] == [True, False]
    assert lease.state.in_flight == 0


@dataclass
class History:
    """Any order of what can happen to a router."""

    router: Router = field(default_factory=Router)
    leases: list[Lease] = field(default_factory=list)
    now: float = 0.0


_endpoints = st.lists(
    st.builds(
        lambda n, model, places, state: an_endpoint(
            f"http://{n}", model=model, max_in_flight=places, state=state
        ),
        st.integers(0, 4),
        st.sampled_from(["chat", "code"]),
        st.integers(1, 3),
        st.sampled_from(["ready", "ready", "draining"]),
    ),
    max_size=6,
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), _endpoints),
        st.tuples(st.just("reserve"), st.sampled_from(["chat", "code", "none"])),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("suspect"), st.integers(0, 20)),
    ),
    max_size=60,
)


def _play(history: History, step: tuple[str, object]) -> None:
    kind, value = step
    router, leases = history.router, history.leases
    history.now += 0.5
    if kind == "apply":
        router.apply(a_table(*value))
    elif kind == "reserve":
        lease = router.reserve(value, now=history.now)
        if lease is None:
            return
        assert lease.endpoint.state == "ready"
        assert lease.endpoint.model == value
        assert lease.state.in_flight <= lease.endpoint.max_in_flight
        leases.append(lease)
    elif leases and kind == "suspect":
        router.suspect(leases[value % len(leases)], until=history.now + 2)
    elif leases:
        router.release(leases.pop(value % len(leases)))


@given(_steps)
def test_places_are_never_oversold_and_all_come_back(steps: list[tuple[str, object]]) -> None:
    history = History()
    seen: set[EndpointState] = set()
    for step in steps:
        _play(history, step)
        seen |= {lease.state for lease in history.leases}
        seen |= set(history.router._states.values())
        for state in seen:
            held = sum(lease.state is state for lease in history.leases)
            assert state.in_flight == held

    for lease in history.leases:
        history.router.release(lease)

    assert all(state.in_flight == 0 for state in seen)


@given(_endpoints)
def test_a_free_place_is_found_whenever_there_is_one(endpoints: list[object]) -> None:
    router = Router()
    router.apply(a_table(*endpoints))
    unique = {(e.model, e.key): e for e in reversed(endpoints)}
    places = sum(
        e.max_in_flight for e in unique.values() if e.model == "chat" and e.state == "ready"
    )

    taken = 0
    while router.reserve("chat", now=0):
        taken += 1

    assert taken == places
