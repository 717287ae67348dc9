"""Roll-outs: models whose shape changed, each one step further per census (`cluster.rollout`)."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from cluster.autoscaler import Autoscaler
from cluster.event_log import EventLog
from cluster.generations import RUNNING, STOPPING, Census, Deployed, GenerationKey, key_of
from cluster.messages import ReplicaReport
from cluster.prefetch import NodeFetch, Prefetch
from cluster.registry import Registry
from cluster.rollout import Incoming, Outgoing, outgoing_targets
from placement.plan import Variant
from placement.routing_policy import Role

_ANSWERING: tuple[Role, ...] = ("whole", "decode")
NO_ROOM_S = 4.0  # a new replica that waits so long for GPUs finds none until an old one goes


class Replaces(Protocol):
    """What Serve is asked for."""

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        """Set a generation's replica count."""
        ...

    async def delete(self, key: GenerationKey) -> None:
        """Let a generation finish what runs, and forget it."""
        ...


class Rollouts:
    """Of all models. `fetch` brings weights to nodes ahead; what happens is told to `events`."""

    def __init__(
        self,
        registry: Registry,
        autoscaler: Autoscaler,
        deployer: Replaces,
        events: EventLog,
        *,
        fetch: NodeFetch,
    ) -> None:
        self._registry = registry
        self._autoscaler = autoscaler
        self._deployer = deployer
        self._events = events
        self.prefetch = Prefetch(fetch, events)
        self._failing: set[GenerationKey] = set()
        self._stages: dict[str, str] = {}  # by model
        self._freed_s: dict[str, float] = {}  # by model: when old replicas went last (monotonic)

    def stage(self, model: str) -> str:
        """How far the model's roll-out is; empty: there is none."""
        return self._stages.get(model, "")

    def heard(self, report: ReplicaReport) -> None:
        """A replica's state changed."""
        key = GenerationKey(report.variant, report.version)
        if report.state == "failed":
            self._failing.add(key)
        elif report.state == "ready":
            self._failing.discard(key)

    def forgive(self) -> None:
        """A new plan: what failed may be tried again."""
        self._failing.clear()
        self.prefetch.keep(())

    async def step(self, variants: Sequence[Variant], now: Census) -> None:
        """One step of every model's roll-out; `variants` are the plan's."""
        wanted = {key_of(variant) for variant in variants}
        self.prefetch.keep(wanted)
        for model in {variant.model for variant in variants}:
            siblings = [variant for variant in variants if variant.model == model]
            await self._step(model, siblings, now)

    async def _step(self, model: str, siblings: Sequence[Variant], now: Census) -> None:
        wanted = {key_of(variant) for variant in siblings}
        all_ = {key: d for key, d in now.generations.items() if d.model == model}
        served = {key: d for key, d in all_.items() if not d.deleting}
        old = {key: self._outgoing(key, d) for key, d in served.items() if key not in wanted}
        if any(d.count(STOPPING) for key, d in all_.items() if key not in wanted):
            self._freed_s[model] = now.begun_s
        if not old:
            if self._stages.pop(model, ""):
                self._note(model, "done")
            return
        new = {key: d for key, d in served.items() if key in wanted}
        there = self._fetched(siblings, [served[key] for key in old], now)
        targets: dict[GenerationKey, int] = {}
        for only_reads in (False, True):  # neither can stand in for the other
            coming = {key: d for key, d in new.items() if d.only_reads == only_reads}
            leaving = {k: each for k, each in old.items() if served[k].only_reads == only_reads}
            incoming = self._incoming(model, coming, now, fetched=there)
            promised = self._promised(siblings, ("prefill",) if only_reads else _ANSWERING)
            targets |= outgoing_targets(leaving, incoming, promised)
        if targets != {key: each.target for key, each in old.items()}:
            self._freed_s[model] = now.begun_s
        await self._ask(targets, old)
        incoming = self._incoming(model, new, now, fetched=there)
        self._tell(model, siblings, old, incoming)

    def _promised(self, siblings: Iterable[Variant], roles: Collection[Role]) -> int:
        return sum(self._autoscaler.target(each) for each in siblings if each.role in roles)

    def _fetched(self, siblings: Iterable[Variant], old: Iterable[Deployed], now: Census) -> bool:
        """Whether weights of what comes are wherever the model serves; they are brought there."""
        homes = {each.node_id for one in old for each in one.replicas if each.state in RUNNING}
        nodes = [(home, now.nodes[home].name, now.nodes[home].pool) for home in sorted(homes)
                 if home in now.nodes]  # fmt: skip
        return self.prefetch.want(siblings, nodes)

    def _outgoing(self, key: GenerationKey, served: Deployed) -> Outgoing:
        reports = self._registry.of_generation(key)
        return Outgoing(
            target=served.target,
            running=served.count(*RUNNING),
            ready=sum(report.state == "ready" for report in reports),
            stopping=served.count(STOPPING),
        )

    def _incoming(
        self, model: str, served: Mapping[GenerationKey, Deployed], now: Census, *, fetched: bool
    ) -> Incoming:
        replicas = [each for one in served.values() for each in one.replicas]
        starting = [each for each in replicas if each.state == "STARTING"]
        waiting = [
            each
            for each in starting
            if each.replica in now.placeless and time.time() - each.started_s > NO_ROOM_S
        ]
        ready = sum(
            report.state == "ready"
            for key in served
            for report in self._registry.of_generation(key)
        )
        # What was freed a moment ago may just be being given out.
        stuck = now.begun_s - self._freed_s.get(model, 0.0) > NO_ROOM_S
        return Incoming(
            ready=ready,
            no_room=fetched and stuck and bool(waiting) and len(waiting) == len(starting),
            failing=any(key in self._failing for key in served),
            gave_up=any(each.gave_up for each in served.values()),
        )

    async def _ask(
        self, targets: Mapping[GenerationKey, int], old: Mapping[GenerationKey, Outgoing]
    ) -> None:
        for key, target in targets.items():
            if target == 0:
                await self._deployer.delete(key)
            elif target != old[key].target:
                await self._deployer.scale(key, target)

    def _tell(
        self,
        model: str,
        siblings: Sequence[Variant],
        old: Mapping[GenerationKey, Outgoing],
        new: Incoming,
    ) -> None:
        promised = self._promised(siblings, ("prefill", *_ANSWERING))
        count = sum(each.ready for each in old.values())
        text = f"{new.ready} of {promised} in the new shape, {count} in the old one"
        if new.failing or new.gave_up:
            text = f"stopped, its engine does not start: {text}"
            if not self._stages.get(model, "").startswith("stopped"):
                self._note(model, text)
        elif model not in self._stages:
            self._note(model, "begun")
        if why := self.prefetch.failure(siblings):
            text = f"stopped, its weights cannot be fetched: {why}"
        if stage := self.prefetch.stage(siblings):
            text += f"; {stage}"
        self._stages[model] = text

    def _note(self, model: str, text: str) -> None:
        self._events.note(time.time(), "rollout", text, model=model)
