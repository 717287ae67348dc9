"""Whatever happens, no place is sold twice, and all come back."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from gateway.endpoints import EndpointTable, ServedModel
from gateway.routing import EndpointState, Fault, Lease, Router
from placement.routing_policy import RoutingPolicy
from tests.gateway.engines import an_endpoint
from tests.gateway.routers import a_call, a_record


@dataclass
class History:
    """Any order of what can happen to a router."""

    router: Router = field(default_factory=Router)
    leases: list[Lease] = field(default_factory=list)
    now: float = 0.0


_endpoints = st.lists(
    st.builds(
        lambda n, model, places, state, variant: an_endpoint(
            f"http://{n}", model=model, max_in_flight=places, state=state, variant=variant
        ),
        st.integers(0, 4),
        st.sampled_from(["chat", "code"]),
        st.integers(1, 3),
        st.sampled_from(["ready", "ready", "draining"]),
        st.sampled_from(["v", "w"]),
    ),
    max_size=6,
)
_policies = st.builds(
    RoutingPolicy,
    policy=st.sampled_from(["auto", "least_load", "prefix", "session", "round_robin", "random"]),
    weights=st.sampled_from([{}, {"v": 1}, {"v": 1, "w": 2}]),
)
_calls = st.one_of(
    st.none(),
    st.builds(
        a_call,
        st.sampled_from(["hi", "long " * 300, "other " * 900]),
        session=st.sampled_from(["s", None]),
    ),
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.tuples(_endpoints, _policies)),
        st.tuples(st.just("reserve"), st.tuples(st.sampled_from(["chat", "code", "none"]), _calls)),
        st.tuples(
            st.just("release"),
            st.tuples(st.integers(0, 20), st.sampled_from([200, 400, 499, 502, None])),
        ),
        st.tuples(st.just("fail"), st.tuples(st.integers(0, 20), st.sampled_from(list(Fault)))),
        st.tuples(st.just("check"), st.tuples(st.integers(0, 4), st.booleans())),
    ),
    max_size=60,
)


def _play(history: History, step: tuple[str, tuple]) -> None:
    kind, (value, how) = step
    router, leases = history.router, history.leases
    history.now += 0.5
    now = history.now
    if kind == "apply":
        models = tuple(ServedModel(name=name, routing=how) for name in {e.model for e in value})
        router.apply(EndpointTable(version=1, models=models, endpoints=value))
    elif kind == "reserve":
        lease = router.reserve(value, now=now, call=how)
        if lease is None:
            return
        assert lease.endpoint.state == "ready"
        assert lease.endpoint.model == value
        assert lease.state.in_flight <= lease.endpoint.max_in_flight
        leases.append(lease)
    elif kind == "check":
        if how:
            router.check_passed(f"http://{value}", now=now)
        else:
            router.check_failed(f"http://{value}", now=now, enough=2)
    elif leases and kind == "fail":
        router.failed(leases[value % len(leases)], how, now=now)
    elif leases:
        lease = leases.pop(value % len(leases))
        router.release(lease, now=now, record=None if how is None else a_record(how))


@given(_steps)
def test_places_and_work_are_never_oversold_and_all_come_back(steps: list) -> None:
    history = History()
    seen: set[EndpointState] = set()
    for step in steps:
        _play(history, step)
        seen |= {lease.state for lease in history.leases}
        seen |= set(history.router._states.values())
        for state in seen:
            held = [lease for lease in history.leases if lease.state is state]
            assert state.in_flight == len(held)
            assert state.work == sum(lease.work for lease in held)
            assert sum(lease.is_probe for lease in held if state.breaker.probing) <= 1

    for lease in history.leases:
        history.router.release(lease)

    assert all(state.in_flight == 0 and state.work == 0 for state in seen)


@given(_endpoints, _policies)
def test_a_free_place_is_found_whenever_there_is_one(
    endpoints: list, policy: RoutingPolicy
) -> None:
    router = Router()
    models = (ServedModel(name="chat", routing=policy), ServedModel(name="code"))
    router.apply(EndpointTable(models=models, endpoints=tuple(endpoints)))
    unique = {(e.model, e.key): e for e in reversed(endpoints)}
    places = sum(
        e.max_in_flight for e in unique.values() if e.model == "chat" and e.state == "ready"
    )

    taken = 0
    while router.reserve("chat", now=0, call=a_call("long " * 300)):
        taken += 1

    assert taken == places
