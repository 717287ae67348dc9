"""LoadMeter: what one model's requests look like over time, for the autoscaler and for `retry-after`."""

from __future__ import annotations

from collections import deque


class LoadMeter:
    """Requests at engines, averaged over time, and how fast they are finished.

    Time is an argument (seconds of any monotonic clock), so that the simulator can use it too.
    """

    def __init__(self, now: float) -> None:
        self.in_flight = 0
        self.requests_total = 0
        self._area = 0.0
        self._since = now
        self._at = now
        self._finished: deque[float] = deque(maxlen=64)

    def began(self, now: float) -> None:
        """A request went to an engine."""
        self._advance(now)
        self.in_flight += 1

    def ended(self, now: float) -> None:
        """A request left its engine."""
        self._advance(now)
        self.in_flight -= 1
        self._finished.append(now)

    def average(self, now: float) -> float:
        """Mean number of requests at engines since the last call."""
        self._advance(now)
        period = now - self._since
        mean = self._area / period if period > 0 else float(self.in_flight)
        self._area, self._since = 0.0, now
        return mean

    def wait_s(self, ahead: int, now: float) -> float:
        """How long `ahead` requests take at the pace of the last 64; 1 s when nothing is known."""
        if len(self._finished) < 2:
            return 1.0
        return ahead * (now - self._finished[0]) / len(self._finished)

    def _advance(self, now: float) -> None:
        self._area += self.in_flight * (now - self._at)
        self._at = now
