"""Lifecycle: replicas go and come with nothing lost: scale-down, drain, roll-out, death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import ray
from pydantic import ValidationError

from cluster.autoscaler import Autoscaler
from cluster.departures import Departures
from cluster.errors import ClusterError
from cluster.event_log import EventLog
from cluster.gang_nodes import Move, NodeWish, next_move
from cluster.generations import RUNNING, Census, GenerationKey, key_of
from cluster.moves import Moves, Rooms
from cluster.placement_check import NodeFacts
from cluster.places import Places
from cluster.prefetch import NodeFetch
from cluster.registry import Registry
from cluster.rollouts import Rollouts
from cluster.second_tries import SecondTries
from placement.plan import Variant

log = logging.getLogger("bora.lifecycle")


class Counts(Protocol):
    """What Serve is asked for."""

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        """Set a generation's replica count."""
        ...

    async def delete(self, key: GenerationKey) -> None:
        """Let a generation finish what runs, and forget it."""
        ...

    async def wishes(self, key: GenerationKey) -> tuple[NodeWish, ...]:
        """On which nodes each place of a generation wants its gangs."""
        ...

    async def move(self, variant: Variant, move: Move) -> None:
        """Give a gang that does not run other nodes than those of its place."""
        ...

    async def again(self, variant: Variant, count: int) -> None:
        """Have `count` replicas of a generation that Serve gave up; those that run stay."""
        ...


class Lifecycle:
    """Holds the last census, which `take` makes, and does what follows from it.

    `departures` go on purpose, `rollouts` replace shapes, `places` compares with the plan, `moves`
    bring it back to that. For `drain_node`, `fetch` and `rooms` see there. `variants()` are the
    plan's; what happens is told to `events`.
    """

    def __init__(
        self,
        registry: Registry,
        autoscaler: Autoscaler,
        deployer: Counts,
        *,
        variants: Callable[[], tuple[Variant, ...]],
        events: EventLog,
        take: Callable[[], Census],
        drain_node: Callable[[str, str, float], None],
        fetch: NodeFetch,
        rooms: Rooms,
    ) -> None:
        self._registry = registry
        self._deployer = deployer
        self._variants = variants
        self._events = events
        self._take = take
        self._census: Census | None = None
        self.acting = (
            asyncio.Lock()
        )  # another plan comes before or after all that a census leads to
        self.places = Places(registry, events)
        self._second_tries = SecondTries(deployer, events)
        self.rollouts = Rollouts(
            registry,
            autoscaler,
            deployer,
            events,
            fetch=fetch,
            hopeless=self._second_tries.hopeless,
        )
        self.departures = Departures(
            registry, autoscaler, deployer, events, nodes=self._nodes, drain_node=drain_node
        )
        self.moves = Moves(registry, autoscaler, self.departures, deployer, events, rooms=rooms)

    def unheard(self) -> bool:
        """Whether replicas run, as Serve says, that have not reported; true before a census."""
        if self._census is None:
            return True
        served = self._census.generations.values()
        running = (each for one in served for each in one.replicas if each.state in RUNNING)
        return any(self._registry.get(each.replica) is None for each in running)

    def outgoing(self) -> list[Variant]:
        """Shapes that still run although the plan has others for their models."""
        wanted = {key_of(variant) for variant in self._variants()}
        found = []
        for key, each in (self._census.generations if self._census else {}).items():
            if key not in wanted and each.config:
                with contextlib.suppress(ValidationError):  # of another version of bora
                    found.append(Variant.model_validate(each.config))
        return found

    async def look(self, *, act: bool) -> bool:
        """Take a census and do what follows from it; True when endpoints may have changed.

        `act`: replicas have had the time to report, so that who is missing is missing.
        """
        variants = self._variants()
        try:
            now = await asyncio.to_thread(self._take)
        except (ray.exceptions.RayError, ClusterError) as error:
            log.warning("Serve or Ray did not answer: %r", error)
            return False
        before = self.outgoing()
        self._census = now
        changed = before != self.outgoing()
        if act:
            changed |= self._bury(now)
            async with self.acting:
                if self._variants() == variants:  # or it looked before what is wanted now
                    await self._act(variants, now)
        self.places.compare(self._variants(), now, self.departures.drained)
        return changed

    async def _act(self, variants: Sequence[Variant], now: Census) -> None:
        try:
            await self._let_go(variants, now)
            await self._second_tries.step(variants, now, self._count, self.rollouts.failing)
            await self._free_gangs(variants, now)
            await self.rollouts.step(variants, now, self.departures.drained)
            await self.moves.step(variants, now)
        except (ray.exceptions.RayError, ClusterError, ValueError) as error:
            log.warning("Serve is busy or restarting: %r", error)  # the next census comes

    def absent(self) -> bool:
        """Whether Serve lacks something of the plan, such as after it did not answer a deployment."""
        there = self._census.generations if self._census else {}
        return any(
            (served := there.get(key_of(variant))) is None or served.deleting
            for variant in self._variants()
        )

    def _bury(self, now: Census) -> bool:
        """Replicas whose process is gone, of which no heartbeat will tell."""
        known = {each.replica for served in now.generations.values() for each in served.replicas}
        lost = self._registry.lost(known, now.begun_s)
        for report in lost:
            if report.state not in ("failed", "draining"):
                self._events.lost(time.time(), report, "its process is gone")
        return bool(lost)

    def _count(self, variant: Variant) -> int:
        """What Serve must aim at."""
        return self.departures.counts([variant])[variant.variant]

    async def _let_go(self, variants: Sequence[Variant], now: Census) -> None:
        """Lower Serve's counts for those that have ended, or whatever else a count differs by."""
        alive = {
            each.replica
            for served in now.generations.values()
            for each in served.replicas
            if each.state in (*RUNNING, "STARTING")
        }
        self.departures.forget_all_but(alive)
        self.departures.clear_of_gangs()
        for variant in variants:
            key, count = key_of(variant), self._count(variant)
            served = now.generations.get(key)
            # Serve has not taken one without a configuration over yet.
            if served and served.config and not served.deleting and served.target != count:
                await self._deployer.scale(key, count)
        models = {"", *(variant.model for variant in variants)}
        for key, served in now.generations.items():
            if served.model not in models and not served.deleting:
                await self._deployer.delete(key)  # of a model that went before Serve knew it

    async def _free_gangs(self, variants: Sequence[Variant], now: Census) -> None:
        """Those that cannot have the nodes of the plan get others."""
        drained = self.departures.drained
        for variant in variants:
            if variant.shape.num_nodes == 1 or key_of(variant) not in now.generations:
                continue
            wishes = await self._deployer.wishes(key_of(variant))
            move = next_move(variant, wishes, now, drained=drained, now_s=time.time())
            if move:
                text = move.told(variant, wishes, now.nodes)
                self._events.note(time.time(), "no-place", text, model=variant.model)
                await self._deployer.move(variant, move)

    def _nodes(self) -> dict[str, NodeFacts]:
        return dict(self._census.nodes) if self._census else {}
