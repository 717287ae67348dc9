"""Recovery: what becomes of a call whose engine failed it.

retry      to another endpoint, before the client has any of an answer
go_on      the stream at another endpoint, after what the client has of it
stand_in   another model, where the operator allows it
"""

from __future__ import annotations

import time

from gateway.access import may_use
from gateway.call import Call
from gateway.continuation import CannotContinue
from gateway.errors import (
    EngineBroke,
    EngineUnreachable,
    GatewayError,
    LateRefusal,
    Overloaded,
    Unavailable,
)
from gateway.migration import Migration
from gateway.plant import Plant
from gateway.record import Record
from gateway.relay import Relay
from gateway.routing import Lease

# Answers that another replica may well not give.
RETRIED_STATUSES = frozenset((429, 500, 502, 503, 504))
_NO_ENGINE = (Unavailable, Overloaded, EngineBroke)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0  # between attempts to go on with a stream


class Recovery:
    """Of one call, from its first fault on. `tried` are endpoints that it should not go to again."""

    __slots__ = (
        *("_call", "_lost", "_moved", "_num_misses", "_num_stalls", "_plant", "_record"),
        *("_failing_since", "_num_unreached", "_stranded_at", "asked_at", "migration", "tried"),
    )

    def __init__(self, plant: Plant, call: Call, record: Record) -> None:
        self.tried: set[str] = set()
        self.migration: Migration | None = None
        self.asked_at = 0.0  # when an engine was asked last
        self._plant, self._call, self._record = plant, call, record
        self._lost = ""  # the endpoint that failed last
        self._moved = False  # once after an engine's 5xx
        self._stranded_at = 0.0  # when a stream lost its engine; 0: it has one
        self._failing_since = time.monotonic()
        self._num_unreached = 0  # engines that never got it
        self._num_stalls = 0  # engines that were left because they fell silent
        self._num_misses = 0  # engines that did not go on with it since

    def lost(self, lease: Lease, fault: GatewayError | int) -> None:
        """The engine at `lease` broke off, cannot be reached, or gave that HTTP status."""
        self._plant.admission.failed(lease, fault)
        self._lost = lease.endpoint.key
        self.tried.add(self._lost)

    def retry(self, error: GatewayError) -> None:
        """See whether the call may ask an endpoint that has not failed it, and wait for one.

        Somebody may replace the lost one.

        Raises:
            GatewayError: `error` again, if there is none and will be none, or after enough attempts.
        """
        admission, model = self._plant.admission, self._record.model
        if isinstance(error, EngineUnreachable):
            self._num_unreached += 1
        if self._call.endpoint_key is not None or self._has_tried_enough:
            raise error
        managed = admission.resolve(model).managed
        if not managed and not admission.router.can_serve(model, self.tried):
            raise error
        self._plant.meter.retried(model, error.code or "")

    def place_after(self, status: int, lease: Lease) -> Lease | None:
        """A place elsewhere, once, if one is free, after the engine at `lease` answered `status`."""
        admission, model = self._plant.admission, self._record.model
        if self._moved or self._has_tried_enough:
            return None
        tried = self.tried | {lease.endpoint.key}
        if not admission.router.can_serve(model, tried) or not admission.may_retry(model):
            return None
        other = admission.try_acquire(model, tried, self._call)
        if other is not None:
            self._plant.meter.retried(model, str(status))
            self._moved, self.tried = True, tried
        return other

    @property
    def _has_tried_enough(self) -> bool:
        """Only an engine that got the call may have died of it: of the others there may be many."""
        limits = self._plant.admission.limits
        if self._record.attempts - self._num_unreached >= limits.max_attempts:
            return True
        return time.monotonic() > self._failing_since + limits.replacement_timeout_s

    def go_on(self, relay: Relay, error: GatewayError) -> float | None:
        """After how many seconds to ask another engine to go on; None: the client has it all.

        Raises:
            GatewayError: it cannot be continued faithfully, or there is nowhere to go.
        """
        record, admission = self._record, self._plant.admission
        limits, now = admission.limits, time.monotonic()
        if record.migrations >= limits.max_migrations:
            raise error
        if self._stranded_at:
            self._num_misses += 1
        else:
            self._stranded_at = now
        try:
            if self.migration is None:
                self.migration = Migration(self._call, relay)
            if self.migration.prepare():
                return None
        except CannotContinue as reason:
            raise EngineBroke(f"{error.message}; it cannot go on elsewhere: {reason}") from None
        # Whoever failed before may be well again: only the last one is passed over.
        self.tried = {self._lost}
        elsewhere = admission.router.can_serve(record.model, self.tried)
        if not elsewhere:
            if not admission.resolve(record.model).managed:
                raise error
            self.tried = set()  # there is no other: ask it again and again, with pauses
        if now > self._stranded_at + limits.replacement_timeout_s:
            raise error
        if not self._num_misses:
            return 0.0
        return min(_FIRST_PAUSE_S * 2.0**self._num_misses, _LONGEST_PAUSE_S)

    def goes_on(self, relay: Relay) -> None:
        """Another engine has begun. Only once it adds to the stream has this one moved."""
        splice = relay.splice
        if splice is None or not self._stranded_at:
            return

        def first(events: bytes) -> bytes:
            added = splice(events)
            if added:
                relay.splice = splice
                self._stranded_at, self._num_misses = 0.0, 0
                self._record.migrations += 1
                self._plant.meter.migrated(self._record.model)
            return added

        relay.splice = first

    def stand_in(self, error: GatewayError) -> Lease | None:
        """A place of another model, of those that may stand in for this one after `error`."""
        plant, record = self._plant, self._record
        if plant.draining or not isinstance(error, _NO_ENGINE):
            return None
        for name in plant.admission.router.fallbacks(self._call.model):
            if name == record.model:
                continue
            if may_use(self._call.tenant, plant.admission.resolve(name)):
                lease = plant.admission.try_acquire(name, (), self._call)
                if lease is not None:
                    plant.meter.retried(record.model, "fallback")
                    self.tried = set()
                    return lease
        return None

    def patience(self, last_at: float) -> tuple[float, float]:
        """Since when, and for how long, an engine may be silent that was heard at `last_at`.

        It may only be busy: so twice as long each time that one was left for that.
        """
        patience_s = self._plant.admission.limits.stall_timeout_s * 2.0**self._num_stalls
        return max(last_at, self.asked_at), patience_s

    def stalled(self) -> None:
        """An engine is left because it fell silent."""
        self._num_stalls += 1


def refusal(status: int, body: bytes, *, wrote: bool) -> GatewayError:
    """The error of an answer that came as `status` after another had begun, which `wrote` a part."""
    if 400 <= status < 500 and status not in RETRIED_STATUSES and not wrote:
        return LateRefusal(status, body)  # nothing but heartbeats: it is about the request
    return EngineBroke(f"the engine answered {status}: {body[:300].decode(errors='replace')}")


def is_hopeless(plant: Plant, model: str) -> bool:
    """Nobody serves `model`, waiting does not start it, and another may stand in for it."""
    admission = plant.admission
    return (
        bool(admission.router.fallbacks(model))
        and not admission.router.can_serve(model)
        and not admission.resolve(model).scalable
    )
