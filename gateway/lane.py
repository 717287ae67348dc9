"""Lane: one model's queue, load and shares. It decides who is next; the admission hands out leases."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gateway.call import Call
from gateway.config import Limits
from gateway.fair_queue import FairQueue
from gateway.load import LoadMeter
from gateway.prediction import USUAL_COMPLETION_TOKENS, prompt_tokens
from gateway.retry_budget import RetryBudget
from gateway.routing import Lease
from gateway.shares import Shares
from gateway.tenants import ANONYMOUS, Tenant

_MAX_CHOOSY = 8  # that may find no place for themselves, before the rest is left for later


@dataclass(slots=True, eq=False)
class Waiter:
    """A request in a queue. Its future becomes a lease, or the reason why there is none."""

    granted: asyncio.Future[Lease]
    tried: Collection[str]
    call: Call | None

    @property
    def tenant(self) -> Tenant:
        """Whose it is."""
        return self.call.tenant if self.call else ANONYMOUS

    @property
    def is_pinned(self) -> bool:
        """Only one endpoint can answer."""
        return self.call is not None and self.call.endpoint_key is not None

    @property
    def num_bytes(self) -> int:
        """Of its body."""
        return len(self.call.body) if self.call is not None else 0

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self.call.priority if self.call else ANONYMOUS.priority


class Lane:
    """`aside` wait those that may need what others do not: after a failure elsewhere, or pinned."""

    __slots__ = (
        "_max_aside",
        "_max_aside_bytes",
        "aside",
        "load",
        "look_again",
        "queue",
        "retries",
        "shares",
    )

    def __init__(self, limits: Limits, now: float) -> None:
        self.load = LoadMeter(now)
        self.shares = Shares()
        self.queue = FairQueue[Waiter](limits.max_queued, limits.max_queued_bytes)
        self.aside: OrderedDict[Waiter, None] = OrderedDict()
        self.retries = RetryBudget(limits.retry_share, limits.retries_per_s, now)
        self._max_aside, self._max_aside_bytes = limits.max_queued, limits.max_queued_bytes
        self.look_again: asyncio.TimerHandle | None = None

    @property
    def length(self) -> int:
        """Requests that wait."""
        return len(self.queue) + len(self.aside)

    def push(self, waiter: Waiter) -> list[Waiter]:
        """Let it wait; returns those for whom there is no room any more."""
        if waiter.tried:  # it has had its turn once: to the front, and never refused
            self.aside[waiter] = None
            self.aside.move_to_end(waiter, last=False)
            return []
        if waiter.is_pinned:
            num_bytes = sum(each.num_bytes for each in (*self.aside, waiter))
            if len(self.aside) >= self._max_aside or num_bytes > self._max_aside_bytes:
                return [waiter]
            self.aside[waiter] = None
            return []
        cost, size = 1.0, 0
        if waiter.call is not None:
            body = waiter.call.body
            most = waiter.call.max_tokens
            cost = prompt_tokens(body) + (USUAL_COMPLETION_TOKENS if most is None else most)
            size = len(body)
        return self.queue.push(
            waiter, waiter.tenant, priority=waiter.priority, cost=cost, size=size
        )

    def drop(self, waiter: Waiter) -> None:
        """It waits no more, if it still did."""
        self.queue.remove(waiter)
        self.aside.pop(waiter, None)

    def may_take(self, tenant: Tenant, now: float, num_free: Callable[[], int]) -> bool:
        """Whether `tenant` may have a place, or what is free is kept for others."""
        if self.shares.is_within(tenant, now):
            return True
        return self.shares.leaves_reserves(tenant, num_free())

    def grant_next(
        self, now: float, num_free: Callable[[], int], lend: Callable[[Waiter], Lease | None]
    ) -> bool:
        """Give the next that may have one a place; False: nobody may, or there is none for them."""
        lease: Lease | None = None
        choosy = 0

        def accept(waiter: Waiter) -> bool:
            nonlocal lease, choosy
            if choosy == _MAX_CHOOSY or not self.may_take(waiter.tenant, now, num_free):
                return False
            lease = lend(waiter)
            choosy += lease is None
            return lease is not None

        waiter = self.queue.pop(accept)
        if waiter is None or lease is None:
            return False
        waiter.granted.set_result(lease)
        return True

    def wait_s(self, tenant: Tenant, priority: int, places: int, now: float) -> float | None:
        """How long a newcomer would wait for one of `places`, all busy; None: nobody knows."""
        ahead = self.queue.ahead_of(tenant, priority) + len(self.aside)
        return self.load.wait_s(ahead, places, now) if places else None
