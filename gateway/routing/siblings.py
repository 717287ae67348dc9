"""Siblings: an engine under several names, a model's and its adapters', has its places only once."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.routing.route import Route
from gateway.routing.state import EndpointState


def count_apart(states: Iterable[EndpointState]) -> None:
    """Each state counts its own requests only, and has no siblings."""
    for state in states:
        if not state.siblings:
            continue
        state.in_flight -= state.others_in_flight
        state.work -= state.others_work
        state.others_in_flight = state.others_work = 0
        state.siblings = ()


def count_together(routes: Iterable[Route]) -> None:
    """States of one engine know each other, and count what all of them have there.

    They were counted apart before.
    """
    families: dict[str, list[Route]] = {}
    for route in routes:
        families.setdefault(route.model.parent or route.model.name, []).append(route)
    for family in families.values():
        if len(family) > 1:
            _count_together(family)


def _count_together(family: Iterable[Route]) -> None:
    engines: dict[str, list[EndpointState]] = {}
    for route in family:
        for key, state in route.by_key.items():
            engines.setdefault(key, []).append(state)
    for states in engines.values():
        if len(states) == 1:
            continue
        in_flight, work = sum(one.in_flight for one in states), sum(one.work for one in states)
        for state in states:
            state.siblings = tuple(one for one in states if one is not state)
            state.others_in_flight = in_flight - state.in_flight
            state.others_work = work - state.work
        for state in states:
            state.in_flight, state.work = in_flight, work


def count_beside(state: EndpointState, requests: int, work: int) -> None:
    """`state` has so much more (or less) in flight: its siblings count it too."""
    for other in state.siblings:
        other.in_flight += requests
        other.others_in_flight += requests
        other.work += work
        other.others_work += work
