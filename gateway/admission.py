"""Admission: who may go to an engine now, who waits, and for how long."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from gateway.call import Call
from gateway.config import Limits
from gateway.endpoints import EndpointTable, ModelLoad, ServedModel
from gateway.errors import GatewayError, NoSuchModel, Overloaded, Unavailable
from gateway.load import LoadMeter
from gateway.record import Record
from gateway.routing import BreakerRules, Lease, Router, fault_of
from placement.errors import nearest

_LONGEST_RETRY_AFTER_S = 60.0
_TIMER_SLACK_S = 0.002  # event loops round to milliseconds


@dataclass(slots=True, eq=False)
class Waiter:
    """A request in a queue. Its future becomes a lease, or the reason why there is none."""

    granted: asyncio.Future[Lease]
    tried: Collection[str]
    call: Call | None

    @property
    def is_choosy(self) -> bool:
        """It may have to wait for what others do not need."""
        return bool(self.tried) or (self.call is not None and self.call.endpoint_key is not None)


@dataclass(slots=True)
class Lane:
    """One model's queue and load."""

    load: LoadMeter
    waiters: OrderedDict[Waiter, None] = field(default_factory=OrderedDict)


class Admission:
    """Hands out leases first come, first served, one queue per model.

    A request waits while all replicas are busy (`queue_timeout_s`), while a scalable model starts
    (`hold_timeout_s`) and while a lost replica is replaced (`replacement_timeout_s`).
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self.router = Router(workers=workers, rules=_breaker_rules(self.limits))
        self.table: EndpointTable | None = None
        self._clock = clock
        self._lanes: dict[str, Lane] = {}

    def apply(self, table: EndpointTable) -> None:
        """Take a new table; whoever waits for an endpoint that it brings goes on."""
        self.router.apply(table)
        self.table = table
        for model in self.router.models:
            self._lanes.setdefault(model.name, Lane(LoadMeter(self._clock())))
        for name, lane in self._lanes.items():
            if self.router.resolve(name) is None:
                self._dismiss(lane, name)
            else:
                self._pump(name)

    def resolve(self, name: str) -> ServedModel:
        """The model that a client means by `name`.

        Raises:
            NoSuchModel: nobody serves it; the message has the nearest names.
            Unavailable: there is no table yet.
        """
        if self.table is None:
            raise Unavailable("the gateway has no endpoint table yet", retry_after_s=1)
        model = self.router.resolve(name)
        if model is None:
            raise self._no_such_model(name)
        return model

    def try_acquire(
        self, model: str, tried: Collection[str] = (), call: Call | None = None
    ) -> Lease | None:
        """A lease if there is one at once. Overtakes nobody, except to try again after a failure."""
        lane = self._lanes[model]
        # Those who have failed somewhere may wait for what newcomers do not need: a new endpoint.
        if not tried and any(not waiter.is_choosy for waiter in lane.waiters):
            return None
        lease = self._reserve(model, tried, call)
        if lease and not tried:
            lane.load.requests_total += 1
        return lease

    async def wait(
        self, model: str, tried: Collection[str] = (), call: Call | None = None
    ) -> Lease:
        """Queue for a lease. Cancelling leaves the queue.

        Raises:
            Overloaded: the queue is full.
            Unavailable: no place came free, or no replica appeared, within the limits.
            NoSuchModel: the model was taken out of the table.
        """
        lane = self._lanes[model]
        waiter = self._enqueue(model, lane, tried, call)
        started = self._clock()
        if tried:
            # An endpoint that hung up once may be well: after a while it may be tried again.
            loop = asyncio.get_running_loop()
            loop.call_later(self.limits.suspect_s, self._forgive, model, waiter)
        try:
            while not waiter.granted.done():
                left = started + self._patience_s(model, waiter.tried) - self._clock()
                if left <= 0:
                    raise self._waited_in_vain(model, waiter.tried)
                await asyncio.wait((waiter.granted,), timeout=left)
            return waiter.granted.result()
        except asyncio.CancelledError:
            # The lease may have been granted in the very moment of the cancellation.
            if waiter.granted.done() and waiter.granted.exception() is None:
                self.release(waiter.granted.result())
            raise
        finally:
            lane.waiters.pop(waiter, None)

    def release(self, lease: Lease, record: Record | None = None) -> None:
        """Give the place to the next in the queue. A second call does nothing.

        Routing learns from `record`: the endpoint's speed and health, the lengths of answers.
        """
        now = self._clock()
        if self.router.release(lease, now=now, record=record):
            model = lease.endpoint.model
            self._lanes[model].load.ended(now)
            self._pump(model)

    def failed(self, lease: Lease, reason: GatewayError | int) -> None:
        """The lease's endpoint failed with `reason`, an error or its HTTP status: prefer others.

        4xx means nothing, but for 429, which like 503 is back-pressure. Before `release`.
        """
        fault = fault_of(reason)
        if fault is None:
            return
        distrusted_s = self.router.failed(lease, fault, now=self._clock())
        # Waiters may have been passed over because of it; look again when it is trusted again.
        asyncio.get_running_loop().call_later(
            distrusted_s + _TIMER_SLACK_S, self.recheck, lease.endpoint.model
        )

    def recheck(self, model: str) -> None:
        """An endpoint of `model` may take requests again: let those who wait go on."""
        if model in self._lanes:
            self._pump(model)

    def queued(self, model: str) -> int:
        """Requests that wait for `model` now."""
        lane = self._lanes.get(model)
        return len(lane.waiters) if lane else 0

    def no_replica(self, model: str) -> Unavailable:
        """The error of a request that found no endpoint of `model` to go to."""
        starting = self.resolve(model).scalable
        state = "is still starting" if starting else "has no running replica"
        return Unavailable(f"the model {model!r} {state}", retry_after_s=10 if starting else 5)

    def loads(self) -> dict[str, ModelLoad]:
        """What every model of the table did since the last call."""
        now = self._clock()
        lanes = {model.name: self._lanes[model.name] for model in self.router.models}
        return {
            name: ModelLoad(
                in_flight=lane.load.average(now),
                queued=len(lane.waiters),
                requests_total=lane.load.requests_total,
            )
            for name, lane in lanes.items()
        }

    def _reserve(self, model: str, tried: Collection[str], call: Call | None) -> Lease | None:
        now = self._clock()
        lease = self.router.reserve(model, now=now, tried=tried, call=call)
        if lease:
            self._lanes[model].load.began(now)
        return lease

    def _forgive(self, model: str, waiter: Waiter) -> None:
        """Let a waiter go back to endpoints that failed it, if they are still in the table."""
        waiter.tried = frozenset()
        self._pump(model)

    def _enqueue(self, model: str, lane: Lane, tried: Collection[str], call: Call | None) -> Waiter:
        waiter = Waiter(asyncio.get_running_loop().create_future(), tried, call)
        if tried:  # it has had its turn once: to the front, and never refused
            lane.waiters[waiter] = None
            lane.waiters.move_to_end(waiter, last=False)
            return waiter
        if len(lane.waiters) >= self.limits.max_queued:
            raise Overloaded(
                f"{len(lane.waiters)} requests wait for the model {model!r}; its queue is full",
                retry_after_s=self._retry_after_s(lane),
            )
        lane.load.requests_total += 1
        lane.waiters[waiter] = None
        return waiter

    def _pump(self, model: str) -> None:
        """Hand free places to whoever waits longest and has not failed there."""
        waiters = self._lanes[model].waiters
        for waiter in list(waiters):
            if waiter.granted.done():
                continue
            lease = self._reserve(model, waiter.tried, waiter.call)
            if lease:
                del waiters[waiter]
                waiter.granted.set_result(lease)
            elif not waiter.is_choosy:
                return  # nobody behind it is less choosy

    def _dismiss(self, lane: Lane, model: str) -> None:
        while lane.waiters:
            waiter, _ = lane.waiters.popitem(last=False)
            if not waiter.granted.done():
                waiter.granted.set_exception(self._no_such_model(model))

    def _no_such_model(self, name: str) -> NoSuchModel:
        hint = nearest(name[:200], self.router.names)
        return NoSuchModel(f"the model {name[:200]!r} does not exist{hint}", param="model")

    def _patience_s(self, model: str, tried: Collection[str]) -> float:
        if self.router.can_serve(model, tried):
            return self.limits.queue_timeout_s
        served = self.router.resolve(model)
        scalable = served is not None and served.scalable
        return self.limits.hold_timeout_s if scalable else self.limits.replacement_timeout_s

    def _waited_in_vain(self, model: str, tried: Collection[str]) -> GatewayError:
        if not self.router.can_serve(model, tried):
            return self.no_replica(model)
        lane = self._lanes[model]
        return Unavailable(
            f"all {self.router.num_ready(model)} replicas of {model!r} were busy for"
            f" {self.limits.queue_timeout_s:g} s; {len(lane.waiters)} requests wait",
            retry_after_s=self._retry_after_s(lane),
        )

    def _retry_after_s(self, lane: Lane) -> float:
        return min(lane.load.wait_s(len(lane.waiters), self._clock()), _LONGEST_RETRY_AFTER_S)


def _breaker_rules(limits: Limits) -> BreakerRules:
    return BreakerRules(limits.breaker_failures, limits.suspect_s, limits.suspect_max_s)
