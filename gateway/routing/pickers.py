"""Pickers: one of the candidates. A policy is a function; affinity never beats overload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from zlib import crc32

from gateway.routing.request import Request
from gateway.routing.route import Route
from gateway.routing.scorers import (
    LoadBound,
    cheapest,
    cheapest_with_cache,
    cost,
    is_lightly_loaded,
)
from gateway.routing.state import EndpointState
from placement.routing_policy import PolicyName

_MANY = 16  # candidates; of more only some are looked at
_HOLDERS_LOOKED_AT = 2
_HOMES_TRIED = 8


# One of the candidates, of which there is at least one, at a time.
Picker = Callable[[Route, Sequence[EndpointState], Request, float], EndpointState]


def auto(
    route: Route, candidates: Sequence[EndpointState], request: Request, now: float
) -> EndpointState:
    """The least cost. Sessions stay where they are, and prompts that nobody knows go home.

    Another gateway may have sent the same beginning there: half of what that would save is believed.
    """
    features, holders = request.features, request.holders
    if features is None:
        return cheapest(candidates, request.work, now)
    if features.session:
        return session(route, candidates, request, now)
    hashes = features.hashes
    if not hashes:
        return cheapest(candidates, request.work, now)
    if not holders or holders[-1] == route.all_bits:  # nobody has more of it than another
        best = cheapest(candidates, request.work, now)
    else:
        best = cheapest_with_cache(candidates, request, now)
    if len(holders) < len(hashes):
        home = route.home(hashes[len(holders)])
        if home is not None and home is not best and home in candidates:
            there, here = request.saved_at(home.bit), request.saved_at(best.bit)
            hoped = there + ((features.prompt_tokens - there) >> 1)
            if cost(home, request, hoped, now) <= cost(best, request, here, now):
                return home
    return best


def session(
    route: Route, candidates: Sequence[EndpointState], request: Request, now: float
) -> EndpointState:
    """Where the session's home is, or the next place that is not overloaded."""
    features = request.features
    if features is None or not features.session:
        return cheapest(candidates, request.work, now)
    bound = LoadBound(route.ready, request.work, route.model.routing.load_factor)
    key = crc32(features.session.encode())
    for _, state in zip(range(_HOMES_TRIED), route.homes(key), strict=False):
        if state in candidates and (is_lightly_loaded(state) or bound.admits(state)):
            return state
    return cheapest(candidates, request.work, now)


def prefix(
    route: Route, candidates: Sequence[EndpointState], request: Request, now: float
) -> EndpointState:
    """Who holds most of the prompt, else its home, as long as that is not overloaded."""
    features, holders = request.features, request.holders
    if features is None or not features.hashes:
        return cheapest(candidates, request.work, now)
    bound = LoadBound(route.ready, request.work, route.model.routing.load_factor)
    for mask in reversed(holders):
        able = [state for state in candidates if state.bit & mask and bound.admits(state)]
        if able:
            return cheapest(able, request.work, now)
    key = features.hashes[min(len(holders), len(features.hashes) - 1)]
    for _, state in zip(range(_HOMES_TRIED), route.homes(key), strict=False):
        if state in candidates and bound.admits(state):
            return state
    return cheapest(candidates, request.work, now)


def least_load(
    _route: Route, candidates: Sequence[EndpointState], _request: Request, now: float
) -> EndpointState:
    """The largest share of free places."""
    return min(candidates, key=lambda s: (s.busy_until > now, s.load, s.last_turn))


def round_robin(
    _route: Route, candidates: Sequence[EndpointState], _request: Request, _now: float
) -> EndpointState:
    """The one that was not chosen for longest."""
    return min(candidates, key=lambda state: state.last_turn)


def picker(policy: PolicyName, random: Random) -> Picker:
    """The function of that name."""

    def any_of(
        _route: Route, candidates: Sequence[EndpointState], _request: Request, _now: float
    ) -> EndpointState:
        return random.choice(candidates)

    pickers: dict[PolicyName, Picker] = {
        "auto": auto,
        "session": session,
        "prefix": prefix,
        "least_load": least_load,
        "round_robin": round_robin,
        "random": any_of,
    }
    return pickers[policy]


def shortlist(
    route: Route, candidates: Sequence[EndpointState], request: Request, random: Random
) -> list[EndpointState]:
    """Two of many at random, and those that may hold the prompt.

    The better of two random choices is nearly as good as the best of all (power of two choices).
    """
    many = len(candidates)
    listed = [candidates[int(random.random() * many)] for _ in range(2)]
    features, holders = request.features, request.holders
    if holders:
        listed += _of_mask(route, holders[-1])
    if features is not None and len(holders) < len(features.hashes):
        home = route.home(features.hashes[len(holders)])
        if home is not None:
            listed.append(home)
    able = listed[:2] + [state for state in listed[2:] if state in candidates]
    return [state for at, state in enumerate(able) if state not in able[:at]]


def are_many(states: Sequence[EndpointState]) -> bool:
    """Too many to look at each of them for each request."""
    return len(states) > _MANY


def _of_mask(route: Route, mask: int) -> list[EndpointState]:
    found: list[EndpointState] = []
    while mask and len(found) < _HOLDERS_LOOKED_AT:
        bit = mask & -mask
        mask ^= bit
        state = route.by_bit.get(bit)
        if state is not None and state.takes_requests:
            found.append(state)
    return found
