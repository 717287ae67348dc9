"""ScalingLoop: replica counts follow the load, or an operator's wish."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import ray

from cluster.autoscaler import Autoscaler, answering, shared_out
from cluster.departures import Departures
from cluster.event_log import EventLog
from cluster.pace import Pace
from cluster.registry import Registry
from placement.plan import Variant

PERIOD_S = 0.5
_LATE_S = 1.0  # this process was held up, and heartbeats wait to be read

log = logging.getLogger("bora.controller")


class ScalingLoop:
    """Decides by `autoscaler`, and has `departures` choose who goes.

    `variants()` are the plan's. `changed()` is called when endpoints may differ.
    """

    def __init__(
        self,
        autoscaler: Autoscaler,
        registry: Registry,
        departures: Departures,
        events: EventLog,
        *,
        variants: Callable[[], tuple[Variant, ...]],
        changed: Callable[[], None],
    ) -> None:
        self._autoscaler = autoscaler
        self._registry = registry
        self._departures = departures
        self._events = events
        self._variants = variants
        self._changed = changed
        self.paces = (Pace("scaling"), Pace("delay"))

    async def run_forever(self, expire: Callable[[float], None]) -> None:
        """Twice a second; `expire` is told how many seconds nobody listened."""
        scaling, delay = self.paces
        due_s = time.monotonic()
        while True:
            due_s += PERIOD_S
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            late_s = time.monotonic() - due_s
            delay.took(late_s)
            deaf_s = late_s if late_s > _LATE_S else 0.0
            if deaf_s:
                due_s = time.monotonic()
            with scaling.round():
                expire(deaf_s)
                await self.follow_load()

    async def follow_load(self) -> None:
        """One round."""
        for variant in self._variants():
            siblings = [each for each in self._variants() if each.model == variant.model]
            if variant in siblings:  # or a plan without it came meanwhile
                await self._follow_load(variant, siblings)

    async def set(self, siblings: Sequence[Variant], replicas: int) -> None:
        """Have so many replicas of a model, until the load says otherwise; its first variant first.

        Of a model whose prompts are read elsewhere: how many answer, and the others follow.

        Raises:
            ConfigError: so many, or so few, are outside of its bounds.
        """
        for variant, count in shared_out(answering(siblings), replicas):
            await self._scale(variant, count, "asked for")
        for variant in siblings:
            follows = variant.role == "prefill"
            if follows and (decision := self._autoscaler.follow(variant, siblings)):
                await self._scale(variant, decision.target, decision.reason)

    async def _follow_load(self, variant: Variant, siblings: Sequence[Variant]) -> None:
        ready = self._registry.ready(variant)
        decision = self._autoscaler.decide(variant, ready, time.monotonic(), siblings)
        if decision is None:
            return
        try:
            await self._scale(variant, decision.target, decision.reason)
        except (ray.exceptions.RayError, ValueError) as error:
            # Serve is busy or restarting: the next round decides anew from the same state.
            log.warning("scaling %s to %d failed: %s", variant.variant, decision.target, error)

    async def _scale(self, variant: Variant, replicas: int, reason: str) -> None:
        await self._departures.scale(variant, replicas)
        self._changed()
        text = f"{variant.variant}: {replicas} replicas ({reason})"
        self._events.note(time.time(), "scaled", text, model=variant.model, reason=reason)
