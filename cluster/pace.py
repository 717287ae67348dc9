"""Pace: how long the rounds of a loop take, of those that ended last."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.messages import LoopTime

_KEPT = 240  # rounds: two minutes of two a second


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
