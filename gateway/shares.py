"""Shares: how a busy model's places are divided among tenants. Pure: time is an argument.

The order of a queue does not help a tenant whose rival holds all places. So for every tenant that was
active lately a reserve is kept: what it needed at most in that time, up to its fair share, less what
it has. A tenant above its fair share gets a place only if more are free than the others' reserves.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.tenants import HIGHEST_PRIORITY, Tenant

WINDOW_S = 30.0
_HALF_WINDOW_S = WINDOW_S / 2
_REFRESH_S = 1.0


@dataclass(slots=True)
class _Holder:
    """A tenant with requests at the model, or that had some lately."""

    weight: float
    priority: int
    active_at: float
    turned_at: float
    in_flight: int = 0
    waiting: int = 0
    peak: int = 0  # since `turned_at`
    earlier_peak: int = 0  # of the half window before
    share: float = 0.0  # places
    reserve: int = 0  # places kept free for it

    def note(self, now: float) -> None:
        """Its demand may be higher than ever lately."""
        demand = self.in_flight + self.waiting
        if now - self.turned_at > _HALF_WINDOW_S:
            old = now - self.turned_at > WINDOW_S
            self.earlier_peak = 0 if old else self.peak
            self.peak, self.turned_at = demand, now
        elif demand > self.peak:
            self.peak = demand


class Shares:
    """One model's. `places` are all that its endpoints have."""

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}
        self._reserved = [0] * (HIGHEST_PRIORITY + 1)  # by the priority of whom it is kept for
        self._places = 0
        self._refreshed_at = 0.0

    def resize(self, places: int, now: float) -> None:
        """The model has so many places now."""
        if places != self._places:
            self._places = places
            self._refresh(now)

    def waits(self, tenant: Tenant, now: float) -> None:
        """A request of `tenant` waits."""
        holder = self._holder(tenant, now)
        holder.waiting += 1
        self._changed(holder, now)

    def waits_no_more(self, tenant: Tenant, now: float) -> None:
        """It left the queue, one way or the other."""
        holder = self._holder(tenant, now)
        holder.waiting -= 1
        self._changed(holder, now)

    def began(self, tenant: Tenant, now: float) -> None:
        """A request of `tenant` got a place."""
        holder = self._holders.get(tenant.name)
        if holder is None:
            holder = self._holder(tenant, now)
        holder.active_at = now
        in_flight = holder.in_flight = holder.in_flight + 1
        if len(self._holders) > 1:
            self._changed(holder, now)
        elif in_flight > holder.peak or now - holder.turned_at > _HALF_WINDOW_S:
            holder.note(now)

    def ended(self, tenant: Tenant, now: float) -> None:
        """It gave the place back."""
        holder = self._holder(tenant, now)
        holder.in_flight -= 1
        if len(self._holders) > 1:
            self._changed(holder, now)

    def is_within(self, tenant: Tenant, now: float) -> bool:
        """Whether `tenant` may have another place without a look at how many are free."""
        holders = self._holders
        if len(holders) <= 1 and tenant.name in holders:
            return True
        if now - self._refreshed_at > _REFRESH_S:
            self._refresh(now)
        holder = self._holder(tenant, now)
        return len(holders) <= 1 or holder.in_flight + 1 <= holder.share

    def leaves_reserves(self, tenant: Tenant, free: int) -> bool:
        """Whether `tenant`, above its share, may take one of `free` places.

        Reserves of lower priority than its own do not bind it.
        """
        holder = self._holders[tenant.name]
        reserved = sum(self._reserved[holder.priority :]) - holder.reserve
        return free > reserved

    def _holder(self, tenant: Tenant, now: float) -> _Holder:
        holder = self._holders.get(tenant.name)
        if holder is None:
            holder = _Holder(tenant.weight, tenant.priority, now, now)
            self._holders[tenant.name] = holder
            self._refresh(now)
        holder.active_at, holder.weight = now, tenant.weight
        return holder

    def _changed(self, holder: _Holder, now: float) -> None:
        holder.note(now)
        self._reserve(holder)

    def _reserve(self, holder: _Holder) -> None:
        needed = min(int(holder.share), max(holder.peak, holder.earlier_peak)) - holder.in_flight
        needed = max(0, needed)
        self._reserved[holder.priority] += needed - holder.reserve
        holder.reserve = needed

    def _refresh(self, now: float) -> None:
        """Forget who was not active lately, and divide the places anew."""
        self._refreshed_at = now
        idle = [
            name
            for name, holder in self._holders.items()
            if not (holder.in_flight or holder.waiting) and now - holder.active_at > WINDOW_S
        ]
        for name in idle:
            del self._holders[name]
        weights = sum(holder.weight for holder in self._holders.values())
        self._reserved = [0] * (HIGHEST_PRIORITY + 1)
        for holder in self._holders.values():
            holder.share = self._places * holder.weight / weights
            holder.reserve = 0
            holder.note(now)
            self._reserve(holder)
