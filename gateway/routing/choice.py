"""Choice: from a request to a lease, through filters, scorers and a picker."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from gateway.call import Call
from gateway.routing.features import Features, features_of
from gateway.routing.filters import available, fitting, untried
from gateway.routing.pickers import Picker, are_many, shortlist
from gateway.routing.request import Request, request_of
from gateway.routing.route import Route
from gateway.routing.siblings import count_beside
from gateway.routing.state import EndpointState, Lease

_BY_LOAD = frozenset(("auto", "least_load"))


def choose(
    route: Route,
    pick: Picker,
    *,
    call: Call | None,
    tried: Collection[str],
    now: float,
    random: Random,
) -> Lease | None:
    """A place for `call`, or None when no endpoint that could serve it has one."""
    ready = untried(route, tried) if tried else route.ready
    features: Features | None = None
    if route.is_mixed and call is not None:
        features = features_of(call)
        ready = fitting(route, ready, call, features)
    if route.is_clear:
        candidates = [state for state in ready if state.in_flight < state.max_in_flight]
    else:
        candidates = available(ready, now)
        route.is_clear = all(state.is_clear(now) for state in route.states)
    if not candidates:
        return None
    if route.split.weights:
        session = call.headers.get("x-session-id") if call is not None else None
        candidates = route.split.of(candidates, session)
    request = request_of(route, call, features)
    is_tied = request.features is not None and request.features.session is not None
    if are_many(candidates) and route.policy in _BY_LOAD and not is_tied:
        candidates = shortlist(route, candidates, request, random)
    return take(route, pick(route, candidates, request, now), request, now)


def take(route: Route, state: EndpointState, request: Request, now: float) -> Lease:
    """A place at `state`, which sees the request's prompt from now on."""
    features, work = request.features, request.work
    prompt_tokens = None
    if features is not None:
        prompt_tokens = features.prompt_tokens
        if request.holders:
            saved = request.saved_at(state.bit)
            work -= saved
            prompt_tokens -= saved
        if features.hashes:
            route.index.add(features.hashes, state.bit)
    route.turn = state.last_turn = route.turn + 1
    state.in_flight = crowd = state.in_flight + 1
    state.work += work
    state.requests += 1
    if state.siblings:
        count_beside(state, 1, work)
    lease = Lease(state, state.endpoint, work, now, crowd, prompt_tokens)
    if not route.is_clear and state.breaker.is_half_open(now) and not state.breaker.probing:
        state.breaker.probing = lease.is_probe = True
    return lease
