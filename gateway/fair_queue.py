"""FairQueue: who of those that wait is next. Pure: no clock, no I/O.

Higher priority first; within a priority start-time fair queueing by tenant (Goyal et al., 1996), where
a request costs its predicted tokens divided by the tenant's weight; within a tenant first come, first
served. Every operation takes O(log n), but for the estimate `ahead_of`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gateway.tenants import HIGHEST_PRIORITY, Tenant

Item = TypeVar("Item", bound=Hashable)
_STALE_ENTRIES = 64  # in the heap of backlogs, besides one a tenant


@dataclass(slots=True, eq=False)
class _Flow(Generic[Item]):
    """A tenant's requests of one priority. `start` is the virtual time at which the first may go."""

    tenant: str
    weight: float
    start: float = 0.0
    finish: float = 0.0
    in_heap: bool = False
    items: OrderedDict[Item, _Place[Item]] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class _Place(Generic[Item]):
    """Where an item stands."""

    level: _Level[Item]
    flow: _Flow[Item]
    cost: float
    size: int


@dataclass(slots=True, eq=False)
class _Level(Generic[Item]):
    """The flows of one priority, in a heap by their start. `now` is its virtual time."""

    now: float = 0.0
    length: int = 0
    flows: dict[str, _Flow[Item]] = field(default_factory=dict)
    heap: list[tuple[float, int, _Flow[Item]]] = field(default_factory=list)


@dataclass(slots=True)
class _Backlog:
    """What waits of one tenant. `version` tells its newest entry in the heap of backlogs."""

    weight: float
    length: int = 0
    size: int = 0
    version: int = 0


class FairQueue(Generic[Item]):
    """Holds at most `max_length` items of `max_size` together (bytes, or whatever `size` counts).

    When there is no room the tenant with the longest backlog for its weight loses its newest item,
    so that one that floods fills the queue for nobody else.
    """

    def __init__(self, max_length: int, max_size: int) -> None:
        self._max_length, self._max_size = max_length, max_size
        self._levels: list[_Level[Item]] = [_Level() for _ in range(HIGHEST_PRIORITY + 1)]
        self._places: dict[Item, _Place[Item]] = {}
        self._backlogs: dict[str, _Backlog] = {}
        self._longest: list[tuple[float, int, int, str]] = []
        self._size = 0
        self._order = 0

    def __len__(self) -> int:
        return len(self._places)

    def push(
        self, item: Item, tenant: Tenant, *, priority: int, cost: float = 1.0, size: int = 0
    ) -> list[Item]:
        """Add `item`; returns those that lost their places for it, which may be itself."""
        level = self._levels[priority]
        flow = level.flows.get(tenant.name)
        if flow is None:
            flow = level.flows[tenant.name] = _Flow(tenant.name, tenant.weight)
        flow.weight = tenant.weight
        self._places[item] = flow.items[item] = _Place(level, flow, cost, size)
        level.length += 1
        self._wait(level, flow)
        self._count(flow, 1, size)
        lost = []
        while len(self._places) > self._max_length or self._size > self._max_size:
            lost.append(self._newest_of(self._loser(tenant.name)))
            self.remove(lost[-1])
        return lost

    def pop(self, accept: Callable[[Item], bool]) -> Item | None:
        """Serve the next one that `accept` takes; of a tenant only its first is offered."""
        for level in reversed(self._levels):
            if not level.length:
                continue
            skipped = []
            try:
                while level.heap:
                    entry = heapq.heappop(level.heap)
                    flow = entry[2]
                    if not flow.items:
                        flow.in_heap = False
                        continue
                    item = next(iter(flow.items))
                    if accept(item):
                        flow.in_heap = False
                        self._serve(level, flow, item)
                        return item
                    skipped.append(entry)
            finally:
                for entry in skipped:
                    heapq.heappush(level.heap, entry)
        return None

    def remove(self, item: Item) -> bool:
        """Take `item` out, unserved; False: it was not there."""
        place = self._places.pop(item, None)
        if place is None:
            return False
        del place.flow.items[item]
        self._shorten(place)
        return True

    def clear(self) -> list[Item]:
        """Take all out; returns them in no order that means anything."""
        items = list(self._places)
        for item in items:
            self.remove(item)
        return items

    def ahead_of(self, tenant: Tenant, priority: int) -> float:
        """About how many go before a newcomer of `tenant`, if nobody else comes."""
        ahead = float(sum(level.length for level in self._levels[priority + 1 :]))
        level = self._levels[priority]
        own = level.flows.get(tenant.name)
        rounds = (len(own.items) if own else 0) + 1
        for flow in level.flows.values():
            share = rounds * flow.weight / tenant.weight
            ahead += len(flow.items) if flow is own else min(len(flow.items), share)
        return ahead

    def _wait(self, level: _Level[Item], flow: _Flow[Item]) -> None:
        """See to it that the flow is in the heap, at the start of its first item."""
        if flow.in_heap or not flow.items:
            return
        self._order += 1
        flow.start, flow.in_heap = max(level.now, flow.finish), True
        heapq.heappush(level.heap, (flow.start, self._order, flow))

    def _serve(self, level: _Level[Item], flow: _Flow[Item], item: Item) -> None:
        place = self._places.pop(item)
        del flow.items[item]
        level.now = max(level.now, flow.start)
        flow.finish = flow.start + place.cost / flow.weight
        self._wait(level, flow)
        self._shorten(place)

    def _shorten(self, place: _Place[Item]) -> None:
        level = place.level
        level.length -= 1
        self._count(place.flow, -1, -place.size)
        if not level.length:  # nobody waits: what each had before the others no longer matters
            level.now = 0.0
            level.flows.clear()
            level.heap.clear()

    def _count(self, flow: _Flow[Item], length: int, size: int) -> None:
        self._size += size
        backlog = self._backlogs.get(flow.tenant)
        if backlog is None:
            backlog = self._backlogs[flow.tenant] = _Backlog(flow.weight)
        backlog.weight = flow.weight
        backlog.length += length
        backlog.size += size
        if not backlog.length:
            del self._backlogs[flow.tenant]
        elif length > 0:
            self._note(flow.tenant, backlog)

    def _note(self, name: str, backlog: _Backlog) -> None:
        """Put a backlog that grew in the heap; entries of what shrank are put right when found."""
        self._order += 1
        backlog.version = self._order
        heapq.heappush(self._longest, (-self._share(backlog), self._order, backlog.version, name))
        if len(self._longest) > 2 * len(self._backlogs) + _STALE_ENTRIES:
            self._longest = [
                (-self._share(each), each.version, each.version, tenant)
                for tenant, each in self._backlogs.items()
            ]
            heapq.heapify(self._longest)

    def _share(self, backlog: _Backlog) -> float:
        """Of the queue, by what it has most of, for one unit of weight."""
        length = backlog.length / max(1, self._max_length)
        return max(length, backlog.size / max(1, self._max_size)) / backlog.weight

    def _loser(self, newcomer: str) -> str:
        """The tenant with the longest backlog; the newcomer's if that is as long."""
        while True:
            share, order, version, name = self._longest[0]
            backlog = self._backlogs.get(name)
            if backlog is None or backlog.version != version:
                heapq.heappop(self._longest)
            elif -share != (now := self._share(backlog)):
                heapq.heapreplace(self._longest, (-now, order, version, name))
            else:
                own = self._backlogs.get(newcomer)
                return newcomer if own and self._share(own) >= now else name

    def _newest_of(self, name: str) -> Item:
        """Of its lowest priority."""
        flows = (level.flows.get(name) for level in self._levels)
        return next(next(reversed(flow.items)) for flow in flows if flow and flow.items)
