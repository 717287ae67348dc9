"""Scorers: what a request would cost at each endpoint, in seconds, and who is overloaded.

It is (work in flight + own work + 2 x own prefill x requests in flight) / speed: a prompt's prefill
holds up everybody who runs there, in usual requests: work in flight over the usual request's work.
What of the prompt is cached costs nothing. 2 was best of 1 to 6 in `tests/gateway/routing_simulation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gateway.routing.request import Request
from gateway.routing.state import EndpointState

_PUSHED_BACK = 4.0  # times the cost, for a moment after a 429 or 503
HELD_UP = 2
_LIGHT_LOAD = 16  # one of so many places taken: the batch has room


def cost(state: EndpointState, request: Request, saved: int, now: float) -> float:
    """Seconds that a request costs there if `saved` tokens of its prompt are cached."""
    prompt_tokens = request.features.prompt_tokens if request.features is not None else 0
    held_up = HELD_UP / request.usual * (prompt_tokens - saved) * state.work
    seconds = (state.work + request.work - saved + held_up) / state.speed
    return seconds * _PUSHED_BACK if state.busy_until > now else seconds


def cheapest(candidates: Sequence[EndpointState], work: int, now: float) -> EndpointState:
    """The least cost; between equals the one that was not chosen for longest."""
    best, least = candidates[0], math.inf
    for state in candidates:
        seconds = (state.work + work) / state.speed
        if state.busy_until > now:
            seconds *= _PUSHED_BACK
        if seconds < least or (seconds == least and state.last_turn < best.last_turn):
            best, least = state, seconds
    return best


def cheapest_with_cache(
    candidates: Sequence[EndpointState], request: Request, now: float
) -> EndpointState:
    """The least `cost`, where endpoints that hold a part of the prompt have less to do.

    It is `cost` written out once more: two calls for each endpoint would take half of the time.
    """
    features, work = request.features, request.work
    prompt_tokens = features.prompt_tokens if features is not None else 0
    held_up = HELD_UP / request.usual
    levels = list(zip(request.holders, request.saved, strict=True))[::-1]
    best, least = candidates[0], math.inf
    for state in candidates:
        bit, in_flight, saved = state.bit, state.work, 0
        for mask, tokens in levels:
            if mask & bit:
                saved = tokens
                break
        seconds = in_flight + work - saved + held_up * (prompt_tokens - saved) * in_flight
        seconds /= state.speed
        if state.busy_until > now:
            seconds *= _PUSHED_BACK
        if seconds < least or (seconds == least and state.last_turn < best.last_turn):
            best, least = state, seconds
    return best


class LoadBound:
    """Who may take more although others have less to do, for the sake of what it has cached."""

    __slots__ = ("_factor", "_mean_s", "_work")

    def __init__(self, states: Sequence[EndpointState], work: int, factor: float) -> None:
        self._work = work
        self._factor = factor
        total = sum(state.work for state in states) + work
        self._mean_s = total / sum(state.speed for state in states)

    def admits(self, state: EndpointState) -> bool:
        """It has at most `factor` times the mean to do, and one request more."""
        return (state.work - self._work) / state.speed <= self._factor * self._mean_s


def is_lightly_loaded(state: EndpointState) -> bool:
    """Another request beside the others costs it little."""
    return state.in_flight * _LIGHT_LOAD <= state.max_in_flight
