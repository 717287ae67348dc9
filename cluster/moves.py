"""Moves: a replica that stands beside another where the plan has them apart goes to its own node.

After a death Serve may start the successor on any node of the pool: it has one set of bundles for
all replicas of a deployment. Once the planned node, or its host under a new Ray id, has room again,
one more replica is asked for while the rooms elsewhere are held, so that Ray has no other place for
it. When it serves, the one that stands beside the plan goes. So capacity is never below the promise,
and where anything comes between, the extra one is taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.autoscaler import Autoscaler
from cluster.departures import Departures, Scales
from cluster.event_log import EventLog
from cluster.generations import STOPPING, Census, Deployed, GenerationKey, bundle, key_of
from cluster.placement_check import Misplaced, NodeFacts, misplaced
from cluster.registry import Registry
from placement.plan import Variant

SETTLE_S = 20.0  # that a replica stands beside the plan: what comes and goes is not chased
AGAIN_S = 600.0  # between two moves of a variant, whatever became of the first
PLACE_S = 15.0  # for Ray to place the extra replica
START_S = 1800.0  # for its engine to start


class Rooms(Protocol):
    """Free resources of nodes. Both may block."""

    def hold(self, rooms: Mapping[str, Mapping[str, float]]) -> Sequence[Any]:
        """Let Ray give these, by its node id, to nobody.

        Raises:
            ClusterError: they are not free any more.
        """
        ...

    def release(self, groups: Sequence[Any]) -> None:
        """Give back what `hold` returned."""
        ...


@dataclass(slots=True)
class _Move:
    """One that is under way."""

    key: GenerationKey
    where: Misplaced
    count: int  # of replicas, without the extra one
    before: Collection[str]
    begun_s: float
    held: Sequence[Any] = field(default_factory=tuple)


class Moves:
    """At most one at a time. `clock`: seconds, monotonic."""

    def __init__(
        self,
        registry: Registry,
        autoscaler: Autoscaler,
        departures: Departures,
        deployer: Scales,
        events: EventLog,
        *,
        rooms: Rooms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._autoscaler = autoscaler
        self._departures = departures
        self._deployer = deployer
        self._events = events
        self._rooms = rooms
        self._clock = clock
        self._since_s: dict[GenerationKey, float] = {}  # that it is not as planned
        self._last_s: dict[str, float] = {}  # of a variant's last move
        self._move: _Move | None = None

    async def step(self, variants: Sequence[Variant], now: Census) -> None:
        """Begin a move that is wanted, or go on with the one that is under way.

        Raises:
            ray.exceptions.RayError: Serve's controller does not answer.
            ClusterError: the rooms elsewhere could not be held; nothing was begun.
        """
        if self._move is not None:
            await self._go_on(self._move, variants, now)
            return
        wanted: dict[GenerationKey, tuple[Variant, Misplaced]] = {}
        keys = {key_of(variant) for variant in variants}
        busy = {each.model for key, each in now.generations.items() if key not in keys}
        for variant in variants:
            if variant.model not in busy and (where := self._wanted(variant, now)):
                wanted[key_of(variant)] = (variant, where)
        self._since_s = {key: self._since_s.get(key, self._clock()) for key in wanted}
        for key, (variant, where) in wanted.items():
            last_s = self._last_s.get(variant.variant)
            rested = last_s is None or self._clock() - last_s >= AGAIN_S
            if rested and self._clock() - self._since_s[key] >= SETTLE_S:
                await self._begin(variant, where, now)
                return

    def _wanted(self, variant: Variant, now: Census) -> Misplaced | None:
        """Where to, if all that is promised serves and nothing else is going on with it."""
        key = key_of(variant)
        served, count = now.generations.get(key), self._autoscaler.target(variant)
        reports = self._registry.of_generation(key)
        ready = [report for report in reports if report.state == "ready"]
        calm = (
            variant.shape.num_nodes == 1
            and served is not None
            and not served.deleting
            and served.target == len(served.replicas) == len(reports) == len(ready) == count
        )
        return misplaced(variant, bundle(variant), ready, self._usable(now)) if calm else None

    def _usable(self, now: Census) -> dict[str, NodeFacts]:
        return {
            node_id: node
            for node_id, node in now.nodes.items()
            if node_id not in self._departures.drained
        }

    async def _begin(self, variant: Variant, where: Misplaced, now: Census) -> None:
        key, needed = key_of(variant), bundle(variant)
        self._last_s[variant.variant] = self._clock()
        [(resource, amount)] = needed.items()
        rooms = {
            node_id: {resource: float(int(node.free.get(resource, 0.0)))}
            for node_id, node in now.nodes.items()
            if node.pool in variant.pools
            and node_id != where.to.node_id
            and node.free.get(resource, 0.0) >= amount
        }
        held = await asyncio.to_thread(self._rooms.hold, rooms)
        replicas = now.generations[key].replicas
        self._move = _Move(
            key,
            where,
            count=self._autoscaler.target(variant),
            before={each.replica for each in replicas},
            begun_s=self._clock(),
            held=held,
        )
        self._departures.more(key)
        self._note(variant.model, f"one more replica, for {where.text}")
        await self._deployer.scale(key, self._departures.counts([variant])[variant.variant])

    async def _go_on(self, move: _Move, variants: Sequence[Variant], now: Census) -> None:
        variant = next((each for each in variants if key_of(each) == move.key), None)
        served = now.generations.get(move.key)
        if now.begun_s < move.begun_s:  # of before it began
            return
        why = self._obstacle(move, variant, served, now)
        if variant is None or served is None or why:
            await self._end(move, f"given up, {why}")
            return
        new = [r for r in served.replicas if r.replica not in move.before and r.node_id]
        if new and move.held:
            await self._let_go(move)
        report = self._registry.get(new[0].replica) if new else None
        if report is not None and report.state == "ready":
            leaver = self._registry.get(move.where.replica)
            if leaver is not None and leaver.state == "ready":
                self._departures.retire(leaver, move.key)
            await self._end(move, f"done: {report.replica} serves on {move.where.to.name}")

    def _obstacle(
        self, move: _Move, variant: Variant | None, served: Deployed | None, now: Census
    ) -> str:
        """Why it cannot be ended well; empty: it still may."""
        if variant is None or served is None or served.deleting:
            return "the plan has changed"
        if self._autoscaler.target(variant) != move.count:
            return "another number of replicas is wanted"
        if move.where.to.node_id not in self._usable(now):
            return f"{move.where.to.name} is gone or drained"
        return self._trouble(move, served)

    def _trouble(self, move: _Move, served: Deployed) -> str:
        """What Ray and Serve make of it."""
        there = {each.replica for each in served.replicas if each.state != STOPPING}
        if not set(move.before) <= there:
            return "a replica has ended meanwhile"
        new = [each for each in served.replicas if each.replica not in move.before]
        placed = [each for each in new if each.node_id]
        if any(each.node_id != move.where.to.node_id for each in placed):
            return "Ray has placed the replica elsewhere"
        waited_s = self._clock() - move.begun_s
        if not placed and waited_s > PLACE_S:
            return f"Ray has not placed the replica for {waited_s:.0f} s"
        if served.gave_up or waited_s > START_S:
            return "its engine does not start there"
        return ""

    async def _end(self, move: _Move, text: str) -> None:
        """Serve's count follows with the next census, as for all that leaves."""
        self._move = None
        self._departures.no_more(move.key)
        await self._let_go(move)
        self._note(move.where.model, f"{text} ({move.where.text})")

    async def _let_go(self, move: _Move) -> None:
        held, move.held = move.held, ()
        await asyncio.to_thread(self._rooms.release, held)

    def _note(self, model: str, text: str) -> None:
        self._events.note(time.time(), "note", f"move: {text}", model=model)
