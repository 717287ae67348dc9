"""Pace: how long the rounds of a loop take, and how often each of many replicas is heard."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.messages import LoopTime

_KEPT = 240  # rounds: two minutes of two a second
_HEARD_PER_S = 100.0  # replicas in all: each takes the listener, one process, about a millisecond
_LONGEST_S = 2.0  # gateways turn away from a dead engine by themselves; this is when it is replaced


def period_s(replicas: int) -> float:
    """After how long one of so many replicas should report again, or Serve should look at it."""
    return min(max(1.0, replicas / _HEARD_PER_S), _LONGEST_S)


class Pace:
    """One loop's. `name` is what it does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seconds: deque[float] = deque(maxlen=_KEPT)

    @contextmanager
    def round(self) -> Iterator[None]:
        """Time the block; one that fails is not counted."""
        started_s = time.monotonic()
        yield
        self.took(time.monotonic() - started_s)

    def took(self, seconds: float) -> None:
        """Count a round."""
        self._seconds.append(seconds)

    def told(self) -> LoopTime:
        """The median and the slowest but one percent; 0 before the first round."""
        ordered = sorted(self._seconds)
        if not ordered:
            return LoopTime(name=self._name, rounds=0, p50_s=0.0, p99_s=0.0)
        last = len(ordered) - 1
        return LoopTime(
            name=self._name,
            rounds=len(ordered),
            p50_s=ordered[round(0.5 * last)],
            p99_s=ordered[round(0.99 * last)],
        )
