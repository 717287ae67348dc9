"""Roll-out: when replicas of an old generation go, while a new one comes. No Ray, no clock.

Old replicas go as new ones are ready, so that never less serves than was promised: neither fewer
replicas nor fewer requests a second. Only where no room is left for a single new replica does an old
one go first; then one is missing for as long as an engine takes to start. Where new replicas fail,
nothing more goes, and a generation that has served is kept, if only without replicas, until all new
ones are ready: so there is something to go back to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.generations import GenerationKey

_EXACT = 1e-9  # sums of rates in another order differ by less


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of some replicas together; `requests_per_s` as planned, 0 where that is not known of all."""

    replicas: int = 0
    requests_per_s: float = 0.0

    def plus(self, count: int, requests_per_s: float) -> Capacity:
        """With `count` more (or fewer), of so many requests a second each."""
        return Capacity(self.replicas + count, self.requests_per_s + count * requests_per_s)

    def covers(self, promised: Capacity) -> bool:
        """Whether it is as much."""
        enough = promised.requests_per_s * (1 - _EXACT) - _EXACT
        return self.replicas >= promised.replicas and self.requests_per_s >= enough


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A generation that the plan no longer names. Replicas in several states are counted in each."""

    target: int  # what Serve aims at
    running: int  # Serve's view: started and not stopping
    ready: int  # of these, gateways may send to them
    stopping: int = 0  # their GPUs are not free yet
    before: int = 0  # the most that it aimed at since it is outgoing
    proven: bool = True  # some replica of it has served
    in_the_way: bool = True  # it runs where new ones wait for GPUs
    requests_per_s: float = 0.0  # of one replica, as planned


@dataclass(frozen=True, slots=True)
class Incoming:
    """All generations of the model that the plan names, together."""

    ready: Capacity
    no_room: bool = False  # replicas wait for GPUs, and none that has them is starting
    failing: bool = False  # an engine ended before it was ready, and none was ready since
    gave_up: bool = False  # that often, that Serve tries no more


def outgoing_targets(
    outgoing: Mapping[GenerationKey, Outgoing], incoming: Incoming, promised: Capacity
) -> dict[GenerationKey, int]:
    """Replica counts that the outgoing generations should have now.

    What is `promised`, old and new together, stays ready wherever there is room for that.
    """
    if incoming.gave_up:
        return _as_before(outgoing, incoming, promised)
    if incoming.failing:
        return {key: each.target for key, each in outgoing.items()}
    # What does not serve yet would only stand in the new one's way.
    targets = {key: min(each.target, each.running) for key, each in outgoing.items()}
    serving = {key: min(each.ready, targets[key]) for key, each in outgoing.items()}
    left = incoming.ready
    for key, count in serving.items():
        left = left.plus(count, outgoing[key].requests_per_s)
    gone = False
    for key in outgoing:
        while targets[key]:
            # Serve chooses who goes: as long as one serves, count with that one.
            less = left.plus(-min(serving[key], 1), outgoing[key].requests_per_s)
            if not less.covers(promised):
                break
            targets[key], serving[key], left = targets[key] - 1, max(serving[key] - 1, 0), less
            gone = True
    if incoming.no_room and not gone and not any(each.stopping for each in outgoing.values()):
        for key in [key for key in outgoing if targets[key] and outgoing[key].in_the_way][:1]:
            targets[key] -= 1
    return targets


def _as_before(
    outgoing: Mapping[GenerationKey, Outgoing], incoming: Incoming, promised: Capacity
) -> dict[GenerationKey, int]:
    """Without surge an old replica went for a new one that does not start: bring it back."""
    targets = {key: each.target for key, each in outgoing.items()}
    left = incoming.ready
    for key, count in targets.items():
        left = left.plus(count, outgoing[key].requests_per_s)
    for key, each in outgoing.items():
        while each.proven and not left.covers(promised):
            if left.replicas >= promised.replicas and targets[key] >= each.before:
                break  # it never had as many requests a second as are promised now
            targets[key] += 1
            left = left.plus(1, each.requests_per_s)
    return targets


def forgettable(
    outgoing: Mapping[GenerationKey, Outgoing],
    targets: Mapping[GenerationKey, int],
    incoming: Incoming,
    promised: Capacity,
) -> set[GenerationKey]:
    """Generations to which nothing will go back: without replicas, and the new ones all serve."""
    done = incoming.ready.covers(promised) and not (incoming.failing or incoming.gave_up)
    return {key for key, each in outgoing.items() if not targets[key] and (done or not each.proven)}
