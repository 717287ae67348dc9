"""RetryBudget: how many requests may be asked a second time, so that overload is not made worse.

As in Finagle: every request earns a share of a retry, and some are granted each second to a model
that is asked rarely.
"""

from __future__ import annotations

_SAVED_S = 10.0  # of what is granted each second, at most


class RetryBudget:
    """Of one model. Time is an argument (seconds of a monotonic clock).

    `share`: retries per request. `per_s`: retries per second besides. With both 0 there are none.
    """

    __slots__ = ("_at", "_most", "_num_requests", "_per_s", "_saved", "_share")

    def __init__(self, share: float, per_s: float, now: float) -> None:
        self._share, self._per_s = share, per_s
        self._saved = self._most = _SAVED_S * per_s
        self._num_requests = 0
        self._at = now

    def take(self, num_requests: int, now: float) -> bool:
        """Whether one more retry is paid for, after `num_requests` in all; it is spent then."""
        earned = self._share * (num_requests - self._num_requests)
        earned += self._per_s * (now - self._at)
        self._num_requests, self._at = num_requests, now
        # What earlier requests earned is only saved up to a limit; these here may all count.
        self._saved = max(self._saved, min(self._saved + earned, max(self._most, 1.0)))
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
