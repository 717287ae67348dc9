"""Heartbeats: what replicas report, taken in, told, and missed when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.adapter_events import adapter_events
from cluster.event_log import EventLog
from cluster.generations import GenerationKey, key_of
from cluster.lifecycle import Lifecycle
from cluster.messages import Orders, ReplicaReport
from cluster.observer import Observer
from cluster.pace import period_s
from cluster.registry import Registry
from cluster.weight_events import WeightEvents
from placement.plan import Variant


class Heartbeats:
    """`changed()` is called when endpoints may differ."""

    def __init__(
        self,
        registry: Registry,
        lifecycle: Lifecycle,
        observer: Observer,
        events: EventLog,
        changed: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._observer = observer
        self._events = events
        self._changed = changed
        self._weights = WeightEvents(events)
        self._failures: dict[GenerationKey, str] = {}

    def failure(self, variant: Variant) -> str:
        """Why an engine of it ended, when none was ready since; empty: nothing is wrong."""
        return self._failures.get(key_of(variant), "")

    def forgive(self) -> None:
        """A new plan: what failed may be tried again."""
        self._failures.clear()

    async def take(self, report: ReplicaReport) -> Orders:
        """What the replica shall do."""
        self._weights.heard(time.time(), report)
        adapters_changed = self._note_adapters(report)
        if self._registry.report(report, time.monotonic()):
            self._observer.changed(report.model)
            self._events.replica(time.time(), report)
            self._lifecycle.rollouts.heard(report)
            key = GenerationKey(report.variant, report.version)
            if report.state == "failed":
                self._failures[key] = report.log_tail or report.stage
            elif report.state == "ready":
                self._failures.pop(key, None)
            self._changed()
            if report.state == "ready":
                await self._observer.ready(report)
        elif adapters_changed:
            self._changed()
        await self._observer.heard(report)
        return Orders(
            next_report_s=period_s(len(self._registry.reports)),
            retire_within_s=self._lifecycle.departures.order_for(report.replica),
        )

    def _note_adapters(self, report: ReplicaReport) -> bool:
        """Tell what a replica has loaded since its last heartbeat; whether there was anything."""
        before = self._registry.get(report.replica)
        found = list(adapter_events(before, report)) if before else []
        for event in found:
            self._events.note(
                time.time(),
                "adapter",
                event.text,
                model=report.model,
                replica=report.replica,
                node=report.node,
                reason=event.reason,
            )
        return bool(found)

    def expire(self, deaf_s: float) -> None:
        """Take out who is silent; `deaf_s`: seconds of late in which this process read nothing."""
        if deaf_s:
            self._registry.pardon(deaf_s)
        for lost in self._registry.expire(time.monotonic()):
            self._observer.changed(lost.model)
            if lost.state not in ("failed", "draining"):
                self._events.lost(time.time(), lost, "no heartbeat, taken out")
            self._changed()
