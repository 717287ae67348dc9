"""LoadMeter: what one model's requests look like over time, for the autoscaler and for `retry-after`."""

from __future__ import annotations

_MEMORY = 0.98  # of how long requests take, per request that ends


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
        self._spent_s = 0.0  # at engines, and how many have ended for it; both fade
        self._ended = 0.0

    def began(self, now: float) -> None:
        """A request went to an engine."""
        self._advance(now)
        self.in_flight += 1

    def ended(self, now: float) -> None:
        """A request left its engine."""
        self._advance(now)
        self.in_flight -= 1
        self._spent_s *= _MEMORY
        self._ended = (self._ended + 1) * _MEMORY

    def average(self, now: float) -> float:
        """Mean number of requests at engines since the last call."""
        self._advance(now)
        period = now - self._since
        mean = self._area / period if period > 0 else float(self.in_flight)
        self._area, self._since = 0.0, now
        return mean

    def wait_s(self, ahead: float, places: int, now: float) -> float | None:
        """How long until `ahead` requests have gone to `places` busy places, and one more can.

        None: no request has ended yet, so nobody knows. By Little's law a request takes the time
        spent at engines over the number that ended, and a place comes free `places` times as often.
        """
        if not self._ended:
            return None
        self._advance(now)
        return (ahead + 1) * self._spent_s / self._ended / max(1, places)

    def _advance(self, now: float) -> None:
        spent_s = self.in_flight * (now - self._at)
        self._area += spent_s
        self._spent_s += spent_s
        self._at = now
