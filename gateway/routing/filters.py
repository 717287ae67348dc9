"""Filters: who may get a request at all."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gateway.call import Call
from gateway.routing.features import Features
from gateway.routing.route import Route
from gateway.routing.state import EndpointState

_VISION = "vision"
_EMBEDDINGS = "embeddings"


def untried(route: Route, tried: Collection[str]) -> Sequence[EndpointState]:
    """Ready ones that have not failed this request; else those that otherwise only read prompts."""
    if not tried:
        return route.ready
    left = [state for state in route.ready if state.endpoint.key not in tried]
    return left or [state for state in route.prefills if state.endpoint.key not in tried]


def available(states: Sequence[EndpointState], now: float) -> list[EndpointState]:
    """Those with a free place among the trusted ones.

    Waiting for a trusted endpoint beats trying one that does not answer. But when none is trusted
    requests still go somewhere: to where the time of distrust ends first.
    """
    trusted = [state for state in states if state.is_trusted(now)]
    if trusted:
        return [state for state in trusted if state.in_flight < state.max_in_flight]
    rest = [state for state in states if state.in_flight < state.max_in_flight]
    return [min(rest, key=_trusted_again)] if rest else []


def fitting(
    route: Route, states: Sequence[EndpointState], call: Call, features: Features
) -> Sequence[EndpointState]:
    """Those that can serve the request, as far as is known.

    Nothing known is no reason to leave an endpoint out. Should that leave nobody, the largest
    context gets it, and the engine says what is wrong: what is known here are estimates.
    """
    needed = _EMBEDDINGS if call.path == "/v1/embeddings" else ""
    if features.num_images:
        needed = _VISION
    if needed:
        known = [(state, route.capabilities(state)) for state in states]
        states = [state for state, has in known if not has or needed in has] or states
    tokens = features.prompt_tokens + (call.max_tokens or 1)
    long_enough = [state for state in states if _context(state) >= tokens]
    if long_enough or not states:
        return long_enough
    longest = max(map(_context, states))
    return [state for state in states if _context(state) == longest]


def _context(state: EndpointState) -> float:
    return state.max_model_len or float("inf")


def _trusted_again(state: EndpointState) -> float:
    return state.trusted_again()
