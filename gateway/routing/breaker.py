"""Breaker: whether an endpoint that failed may be asked again. No clock: `now` is an argument.

closed -> open     at once when nobody listens there, or after failures in a row or many of the last
open -> half-open  when its time is over, which doubles each time it opens again
open -> closed     before that, when somebody listens again or a request succeeds all the same
half-open          one request goes through: its success closes, its failure opens again

Back-pressure (429, 503) and errors of the client (4xx) are no failures.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from gateway.errors import EngineUnreachable, GatewayError

_WINDOW = 20  # the last results that a rate is taken of
_WINDOW_FAILURES = 10

BreakerState = Literal["closed", "open", "half_open"]


class Fault(enum.Enum):
    """What went wrong at an endpoint."""

    UNREACHABLE = "unreachable"  # no connection
    BROKE = "broke"  # the connection ended within an answer, or it was no HTTP
    ERROR = "error"  # it answered 500, 502 or 504
    BUSY = "busy"  # it answered 429 or 503: back-pressure, not a failure
    SLOW = "slow"  # beside its peers


def fault_of(reason: GatewayError | int) -> Fault | None:
    """What an error, or an engine's HTTP status, says of the endpoint; None: it did nothing wrong."""
    if isinstance(reason, EngineUnreachable):
        return Fault.UNREACHABLE
    if isinstance(reason, GatewayError):
        return Fault.BROKE
    if reason in {429, 503}:
        return Fault.BUSY
    return Fault.ERROR if reason >= 500 else None


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When a breaker opens, and for how long."""

    failures: int = 3  # in a row
    open_s: float = 2.0
    max_open_s: float = 30.0


class Breaker:
    """One endpoint's breaker."""

    __slots__ = ("_in_a_row", "_opened", "_results", "cause", "open_until", "probing", "rules")

    def __init__(self, rules: BreakerRules) -> None:
        self.rules = rules
        self.open_until = -math.inf
        self.probing = False  # a request is on its way that decides
        self.cause: Fault | None = None  # of its being open
        self._opened = 0  # times in a row, without a success between
        self._in_a_row = 0
        self._results: deque[bool] = deque(maxlen=_WINDOW)  # True: a failure

    @property
    def closed(self) -> bool:
        """Requests pass as if nothing had ever happened."""
        return self._opened == 0

    @property
    def is_slow(self) -> bool:
        """It is open because the endpoint is slow, not because it failed."""
        return self.cause is Fault.SLOW

    def state(self, now: float) -> BreakerState:
        """For humans and metrics."""
        if not self._opened:
            return "closed"
        return "open" if now < self.open_until else "half_open"

    def admits(self, now: float) -> bool:
        """Whether a request may pass."""
        return not self._opened or (now >= self.open_until and not self.probing)

    def failed(self, fault: Fault, now: float) -> bool:
        """Count a failure. True: it opened (again)."""
        if fault is Fault.BUSY:
            return False
        self._in_a_row += 1
        self._results.append(True)
        many = self._in_a_row >= self.rules.failures or sum(self._results) >= _WINDOW_FAILURES
        if not (fault is Fault.UNREACHABLE or many or self.is_half_open(now)):
            return False
        if now < self.open_until:
            return False  # those that were under way when it opened say nothing new
        self.trip(now, fault)
        return True

    def succeeded(self) -> bool:
        """Count a success of a request. True: that closed it."""
        self._in_a_row = 0
        self._results.append(False)
        return self.close()

    def close(self) -> bool:
        """Forget that it was open. True: it was."""
        was_open, self._opened = self._opened > 0, 0
        if was_open:
            self.open_until = -math.inf
            self.probing, self.cause = False, None
            self._in_a_row = 0
            self._results.clear()
        return was_open

    def trip(self, now: float, cause: Fault, *, open_s: float | None = None) -> None:
        """Open for `open_s`; None: for twice as long as the last time if it has not closed since."""
        if open_s is None:
            doubled = self.rules.open_s * 2.0 ** min(self._opened, 16)
            open_s = min(doubled, self.rules.max_open_s)
        self.open_until = now + open_s
        self._opened += 1
        self.probing, self.cause = False, cause

    def is_half_open(self, now: float) -> bool:
        """The next result decides."""
        return self._opened > 0 and now >= self.open_until
