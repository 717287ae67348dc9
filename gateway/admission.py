"""Admission: who may go to an engine now, who waits, and for how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence

from gateway.call import Call
from gateway.config import Limits
from gateway.endpoints import EndpointTable, ModelLoad, ServedModel
from gateway.errors import GatewayError, NoSuchModel, Overloaded, Unavailable, WouldBeLate
from gateway.lane import Lane, Waiter
from gateway.record import Record
from gateway.routing import BreakerRules, Lease, Router, fault_of
from gateway.tenants import ANONYMOUS, Tenant
from placement.errors import nearest

_LONGEST_RETRY_AFTER_S = 60.0
_TIMER_SLACK_S = 0.002  # event loops round to milliseconds
_RESERVES_LAPSE_S = 1.0  # how often those are looked at whom only a reserve holds back


class Admission:
    """Hands out leases, one fair queue per model, so that no tenant crowds out another.

    A request waits while all replicas are busy (`queue_timeout_s`), while a scalable model starts
    (`hold_timeout_s`) and while a lost replica is replaced (`replacement_timeout_s`).
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int = 1,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self.router = Router(workers=workers, rules=_breaker_rules(self.limits), seed=seed)
        self.table: EndpointTable | None = None
        self._clock = clock
        self._lanes: dict[str, Lane] = {}

    def apply(self, table: EndpointTable) -> None:
        """Take a new table; whoever waits for an endpoint that it brings goes on."""
        self.router.apply(table)
        self.table = table
        now = self._clock()
        for model in self.router.models:
            lane = self._lanes.get(model.name)
            if lane is None:
                lane = self._lanes[model.name] = Lane(self.limits, now)
            lane.shares.resize(self.router.places(model.name)[1], now)
        for name, lane in self._lanes.items():
            if self.router.resolve(name) is None:
                self._dismiss(lane, name)
            else:
                self._pump(name)

    def resolve(self, name: str, tenant: Tenant = ANONYMOUS) -> ServedModel:
        """The model that a client of `tenant` means by `name`.

        Raises:
            NoSuchModel: nobody serves it; the message has the nearest names that it may use.
            Unavailable: there is no table yet.
        """
        if self.table is None:
            raise Unavailable("the gateway has no endpoint table yet", retry_after_s=1)
        model = self.router.resolve(name)
        if model is None:
            raise self._no_such_model(name, tenant)
        return model

    def try_acquire(
        self, model: str, tried: Collection[str] = (), call: Call | None = None
    ) -> Lease | None:
        """A lease if there is one at once. Overtakes nobody, except to try again after a failure."""
        lane, now = self._lanes[model], self._clock()
        # Those who have failed somewhere may wait for what newcomers do not need: a new endpoint.
        if not tried:
            if lane.queue:
                return None
            tenant = call.tenant if call else ANONYMOUS
            shares = lane.shares
            if not shares.is_within(tenant, now) and not shares.leaves_reserves(
                tenant, self._free(model)
            ):
                return None
        lease = self._lend(model, lane, tried, call, now)
        if lease and not tried:
            lane.load.requests_total += 1
        return lease

    async def wait(
        self, model: str, tried: Collection[str] = (), call: Call | None = None
    ) -> Lease:
        """Queue for a lease. Cancelling leaves the queue.

        Raises:
            Overloaded: the queue is full, or was filled by others with a better claim.
            WouldBeLate: its turn would come after the time that the client gives.
            Unavailable: no place came free, or no replica appeared, within the limits.
            NoSuchModel: the model was taken out of the table.
        """
        lane = self._lanes[model]
        waiter = self._enqueue(model, lane, tried, call)
        started = self._clock()
        lane.shares.waits(waiter.tenant, started)
        if lane.queue:
            self._pump(model)  # those before it may be held back by what it is entitled to
        if tried:
            # An endpoint that hung up once may be well: after a while it may be tried again.
            loop = asyncio.get_running_loop()
            loop.call_later(self.limits.suspect_s, self._forgive, model, waiter)
        try:
            while not waiter.granted.done():
                left = started + self._patience_s(model, waiter.tried) - self._clock()
                if left <= 0:
                    raise self._waited_in_vain(model, waiter)
                await asyncio.wait((waiter.granted,), timeout=left)
            return waiter.granted.result()
        except asyncio.CancelledError:
            # The lease may have been granted in the very moment of the cancellation.
            if waiter.granted.done() and waiter.granted.exception() is None:
                self.release(waiter.granted.result())
            raise
        finally:
            lane.drop(waiter)
            lane.shares.waits_no_more(waiter.tenant, self._clock())

    def release(self, lease: Lease, record: Record | None = None) -> None:
        """Give the place to the next in the queue. A second call does nothing.

        Routing learns from `record`: the endpoint's speed and health, the lengths of answers.
        """
        now = self._clock()
        if self.router.release(lease, now=now, record=record):
            model = lease.endpoint.model
            lane = self._lanes[model]
            lane.load.ended(now)
            lane.shares.ended(lease.tenant, now)
            if lease.state.siblings:
                self._pump_all([*(each.endpoint.model for each in lease.state.siblings), model])
            elif lane.length:
                self._pump(model)

    def _pump_all(self, models: Sequence[str]) -> None:
        """A place is free at an engine that has several names: first to who runs least there."""
        waiting = [model for model in models if self._lanes[model].length]
        for model in sorted(waiting, key=lambda each: self._lanes[each].load.in_flight):
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
        lane = self._lanes.get(model)
        if lane is not None:
            for waiter in lane.aside:
                waiter.tried = frozenset()  # what failed it may be what is well again
            self._pump(model)

    def may_retry(self, model: str) -> bool:
        """Whether the model's retry budget allows one more; it is spent then."""
        lane = self._lanes[model]
        return lane.retries.take(lane.load.requests_total, self._clock())

    def queued(self, model: str) -> int:
        """Requests that wait for `model` now."""
        lane = self._lanes.get(model)
        return lane.length if lane else 0

    def no_replica(self, model: str) -> Unavailable:
        """The error of a request that found no endpoint of `model` to go to."""
        served = self.router.resolve(model)
        starting = served is not None and served.scalable
        state = "is still starting" if starting else "has no running replica"
        return Unavailable(f"the model {model!r} {state}", retry_after_s=10 if starting else 5)

    def loads(self) -> dict[str, ModelLoad]:
        """What every model of the table did since the last call."""
        now = self._clock()
        lanes = {model.name: self._lanes[model.name] for model in self.router.models}
        return {
            name: ModelLoad(
                in_flight=lane.load.average(now),
                queued=lane.length,
                requests_total=lane.load.requests_total,
            )
            for name, lane in lanes.items()
        }

    def _lend(
        self, model: str, lane: Lane, tried: Collection[str], call: Call | None, now: float
    ) -> Lease | None:
        """A place for `call`, in its tenant's name, if there is one."""
        lease = self.router.reserve(model, now=now, tried=tried, call=call)
        if lease is not None:
            lane.load.began(now)
            lease.tenant = tenant = call.tenant if call else ANONYMOUS
            lane.shares.began(tenant, now)
        return lease

    def _free(self, model: str) -> int:
        return self.router.places(model)[0]

    def _forgive(self, model: str, waiter: Waiter) -> None:
        """Let a waiter go back to endpoints that failed it, if they are still in the table."""
        waiter.tried = frozenset()
        self._pump(model)

    def _enqueue(self, model: str, lane: Lane, tried: Collection[str], call: Call | None) -> Waiter:
        waiter = Waiter(asyncio.get_running_loop().create_future(), tried, call)
        if not tried:
            if call is not None and call.timeout_s is not None:
                self._refuse_if_late(model, lane, waiter, call.timeout_s)
            lane.load.requests_total += 1
        lost = lane.push(waiter)
        for loser in lost:
            if not loser.granted.done():
                loser.granted.set_exception(self._queue_is_full(model, lane, loser))
        if waiter in lost:
            lane.load.requests_total -= 1  # it was not accepted
            raise waiter.granted.exception() or self._queue_is_full(model, lane, waiter)
        return waiter

    def _pump(self, model: str) -> None:
        """Hand free places to those that failed elsewhere, then to whoever has the best claim."""
        lane = self._lanes[model]
        for waiter in list(lane.aside):
            lease = self._lend(model, lane, waiter.tried, waiter.call, self._clock())
            if lease:
                del lane.aside[waiter]
                waiter.granted.set_result(lease)
        if not lane.queue:
            return
        lane.shares.resize(self.router.places(model)[1], self._clock())
        while lane.queue and self._free(model):
            granted = lane.grant_next(
                self._clock(),
                lambda: self._free(model),
                lambda waiter: self._lend(model, lane, waiter.tried, waiter.call, self._clock()),
            )
            if not granted:
                self._look_again(model, lane)
                return

    def _look_again(self, model: str, lane: Lane) -> None:
        """Places are free, but kept for others: their claim lapses with time, without an event."""
        if lane.look_again is not None:
            lane.look_again.cancel()
        loop = asyncio.get_running_loop()
        lane.look_again = loop.call_later(_RESERVES_LAPSE_S, self._pump, model)

    def _dismiss(self, lane: Lane, model: str) -> None:
        for waiter in (*lane.queue.clear(), *lane.aside):
            if not waiter.granted.done():
                waiter.granted.set_exception(self._no_such_model(model, waiter.tenant))
        lane.aside.clear()

    def _no_such_model(self, name: str, tenant: Tenant) -> NoSuchModel:
        names = self.router.names
        if tenant.models is not None:
            names = [known for known in names if known in tenant.models]
        hint = nearest(name[:200], names) if names else ""
        return NoSuchModel(f"the model {name[:200]!r} does not exist{hint}", param="model")

    def _queue_is_full(self, model: str, lane: Lane, waiter: Waiter) -> Overloaded:
        return Overloaded(
            f"{lane.length} requests wait for the model {model!r}; its queue is full, and"
            f" {waiter.tenant.name} has its share of it",
            retry_after_s=self._retry_after_s(model, lane, waiter),
        )

    def _patience_s(self, model: str, tried: Collection[str]) -> float:
        if self.router.can_serve(model, tried):
            return self.limits.queue_timeout_s
        served = self.router.resolve(model)
        scalable = served is not None and served.scalable
        return self.limits.hold_timeout_s if scalable else self.limits.replacement_timeout_s

    def _waited_in_vain(self, model: str, waiter: Waiter) -> GatewayError:
        if not self.router.can_serve(model, waiter.tried):
            return self.no_replica(model)
        lane = self._lanes[model]
        return Unavailable(
            f"all {self.router.num_ready(model)} replicas of {model!r} were busy, or kept for"
            f" others, for {self.limits.queue_timeout_s:g} s; {lane.length} requests wait",
            retry_after_s=self._retry_after_s(model, lane, waiter),
        )

    def _refuse_if_late(self, model: str, lane: Lane, waiter: Waiter, timeout_s: float) -> None:
        free, places = self.router.places(model)
        if free and not lane.length:
            return
        wait_s = lane.wait_s(waiter.tenant, waiter.priority, places, self._clock())
        if wait_s is not None and wait_s > timeout_s:
            raise WouldBeLate(
                f"a request to {model!r} waits about {wait_s:.1f} s now, and the client gives"
                f" {timeout_s:g} s",
                retry_after_s=min(wait_s - timeout_s, _LONGEST_RETRY_AFTER_S),
            )

    def _retry_after_s(self, model: str, lane: Lane, waiter: Waiter) -> float:
        places = self.router.places(model)[1]
        wait_s = lane.wait_s(waiter.tenant, waiter.priority, places, self._clock())
        return min(1.0 if wait_s is None else wait_s, _LONGEST_RETRY_AFTER_S)


def _breaker_rules(limits: Limits) -> BreakerRules:
    return BreakerRules(limits.breaker_failures, limits.suspect_s, limits.suspect_max_s)
