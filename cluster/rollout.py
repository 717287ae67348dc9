"""Roll-out: when replicas of an old generation go, while a new one comes. No Ray, no clock.

Old replicas go as new ones are ready, so that never fewer serve than were promised. Only where no
room is left for a single new replica does an old one go first; then one is missing for as long as
an engine takes to start. Where new replicas fail, nothing more goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.generations import GenerationKey


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A generation that the plan no longer names. Replicas in several states are counted in each."""

    target: int  # what Serve aims at
    running: int  # Serve's view: started and not stopping
    ready: int  # gateways may send to it
    stopping: int = 0  # their GPUs are not free yet


@dataclass(frozen=True, slots=True)
class Incoming:
    """All generations of the model that the plan names, together."""

    ready: int
    no_room: bool = False  # replicas wait for GPUs, and none that has them is starting
    failing: bool = False  # an engine ended before it was ready, and none was ready since
    gave_up: bool = False  # that often, that Serve tries no more


def outgoing_targets(
    outgoing: Mapping[GenerationKey, Outgoing], incoming: Incoming, promised: int
) -> dict[GenerationKey, int]:
    """Replica counts that the outgoing generations should have now; 0: delete it.

    `promised` replicas, old and new together, stay ready wherever there is room for that.
    """
    if incoming.gave_up:
        return _as_before(outgoing, incoming, promised)
    if incoming.failing:
        return {key: each.target for key, each in outgoing.items()}
    # What does not serve yet would only stand in the new one's way.
    targets = {key: min(each.target, each.running) for key, each in outgoing.items()}
    serving = {key: min(each.ready, targets[key]) for key, each in outgoing.items()}
    spare = max(incoming.ready + sum(serving.values()) - promised, 0)
    stopping = any(each.stopping for each in outgoing.values())
    if not spare and incoming.no_room and not stopping:
        spare = 1
    for key, target in list(targets.items()):
        gone = min(spare, target)
        targets[key] = target - gone
        spare -= gone
    return targets


def _as_before(
    outgoing: Mapping[GenerationKey, Outgoing], incoming: Incoming, promised: int
) -> dict[GenerationKey, int]:
    """Without surge an old replica went for a new one that does not start: bring it back."""
    targets = {key: each.target for key, each in outgoing.items()}
    missing = promised - incoming.ready - sum(targets.values())
    serving = [key for key, each in outgoing.items() if each.running]
    if missing > 0 and serving:
        targets[serving[0]] += missing
    return targets
