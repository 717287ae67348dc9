"""Scorers: the seconds that a request would take at each endpoint, and who is overloaded.

cost = (work in flight + the request's own work - what of its prompt is cached) / speed
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gateway.routing.features import BLOCK_ENDS, Features
from gateway.routing.state import EndpointState

_PUSHED_BACK = 4.0  # times the cost, for a moment after a 429 or 503
_LIGHT_LOAD = 16  # one of so many places taken: the batch has room


def savings(features: Features, num_blocks: int) -> list[int]:
    """Prompt tokens that need no prefill where 1, 2, ... `num_blocks` blocks are cached."""
    tokens, num_bytes = features.prompt_tokens, features.num_bytes
    return [tokens * end // num_bytes for end in BLOCK_ENDS[:num_blocks]]


def saved_at(bit: int, holders: Sequence[int], saved: Sequence[int]) -> int:
    """Prompt tokens that the endpoint `bit` has cached."""
    for level in range(len(holders) - 1, -1, -1):
        if holders[level] & bit:
            return saved[level]
    return 0


def cost(state: EndpointState, work: int, now: float) -> float:
    """Seconds until a request of `work` is done there, after all that is before it."""
    seconds = (state.work + work) / state.speed
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
    candidates: Sequence[EndpointState],
    work: int,
    holders: Sequence[int],
    saved: Sequence[int],
    now: float,
) -> EndpointState:
    """As `cheapest`, where endpoints that hold a part of the prompt have less to do."""
    best, least = candidates[0], math.inf
    for state in candidates:
        seconds = cost(state, work - saved_at(state.bit, holders, saved), now)
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
