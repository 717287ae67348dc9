"""Lifecycle: replicas go and come with nothing lost: scale-down, drain, roll-out, death.

Serve can be told how many replicas there should be, not which one should go. So the one that bora
chooses drains and ends its process, and only then is Serve's count lowered: the successor that Serve
began at once is the first that it takes back, long before an engine starts in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import ray
from pydantic import ValidationError

from cluster.autoscaler import Autoscaler
from cluster.errors import ClusterError
from cluster.event_log import EventLog
from cluster.generations import RUNNING, Census, Deployed, GenerationKey, key_of
from cluster.messages import Drained, DrainRequest, EventKind, ReplicaReport
from cluster.placement_check import NodeFacts
from cluster.places import Places
from cluster.prefetch import NodeFetch, Prefetch
from cluster.registry import Registry
from cluster.rollout import Incoming, Outgoing, outgoing_targets
from placement.errors import ConfigError, UnknownName
from placement.plan import Variant
from placement.routing_policy import Role

_ANSWERING: tuple[Role, ...] = ("whole", "decode")
NO_ROOM_S = 4.0  # a new replica that waits so long for GPUs finds none until an old one goes

log = logging.getLogger("bora.lifecycle")


@dataclass(frozen=True, slots=True)
class _Retirement:
    """A replica that was told to go."""

    key: GenerationKey
    timeout_s: float
    replaced: bool  # the count stays: Serve starts a successor


class Counts(Protocol):
    """What Serve is asked for."""

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        """Set a generation's replica count."""
        ...

    async def delete(self, key: GenerationKey) -> None:
        """Let a generation finish what runs, and forget it."""
        ...


class Lifecycle:
    """Holds the last census, which `take` makes; `drain_node` empties a node (`cluster.census`).

    `fetch` brings weights to nodes ahead of roll-outs.

    What happens is told to `events`; `variants()` are the plan's.
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
    ) -> None:
        self._take = take
        self._drain_node = drain_node
        self._registry = registry
        self._autoscaler = autoscaler
        self._deployer = deployer
        self._variants = variants
        self._events = events
        self.places = Places(registry, events)
        self.prefetch = Prefetch(fetch, events)
        self._census: Census | None = None
        self._retiring: dict[str, _Retirement] = {}
        self._drained: set[str] = set()  # nodes that Ray will place nothing on
        self._failing: set[GenerationKey] = set()
        self._rollouts: dict[str, str] = {}  # by model
        self._freed_s: dict[str, float] = {}  # by model: when old replicas went last (monotonic)

    # What others ask

    def rollout(self, model: str) -> str:
        """How far the model's roll-out is; empty: there is none."""
        return self._rollouts.get(model, "")

    def order_for(self, replica: str) -> float | None:
        """Seconds within which a replica must finish and go; None: it stays."""
        retirement = self._retiring.get(replica)
        return retirement.timeout_s if retirement else None

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

    def counts(self, variants: Iterable[Variant]) -> dict[str, int]:
        """What Serve must aim at: the wanted ones, and those that leave but still live."""
        return {
            variant.variant: self._autoscaler.target(variant) + self._leaving(key_of(variant))
            for variant in variants
        }

    def _leaving(self, key: GenerationKey) -> int:
        return sum(each.key == key and not each.replaced for each in self._retiring.values())

    # Going on purpose

    async def scale(self, variant: Variant, replicas: int) -> None:
        """Have `replicas` of it. Those that still start go first, then the idlest."""
        key = key_of(variant)
        before = self._autoscaler.target(variant)
        reports = self._registry.of_generation(key)
        serving = [each for each in reports if each.state in ("ready", "unhealthy")]
        starting = max(before - len(serving), 0)
        surplus = before - replicas - starting
        if 0 < surplus < len(serving):
            for report in sorted(serving, key=_business)[:surplus]:
                self._retire(report, key, replaced=False)
        self._autoscaler.set(variant, replicas)
        await self._deployer.scale(key, replicas + self._leaving(key))

    def _retire(
        self, report: ReplicaReport, key: GenerationKey, *, replaced: bool, timeout_s: float = 600.0
    ) -> None:
        self._registry.retire(report.replica)
        self._retiring[report.replica] = _Retirement(key, timeout_s, replaced)
        self._events.note(
            time.time(),
            "drained" if replaced else "replica-draining",
            f"replica {report.replica}: draining",
            model=report.model,
            replica=report.replica,
            node=report.node,
            reason="asked for, another takes its place" if replaced else "fewer are wanted",
        )

    async def drain(self, request: DrainRequest) -> Drained:
        """Empty a replica, or a node with all replicas on it; returns when that has begun.

        Raises:
            UnknownName: there is no such replica or node.
            ConfigError: it cannot be drained.
            ClusterError: Ray refuses to.
        """
        report = self._registry.get(request.target)
        if report is not None:
            key = GenerationKey(report.variant, report.version)
            if report.replica not in self._retiring:
                self._retire(report, key, replaced=True, timeout_s=request.timeout_s)
            return Drained(replicas=(report.replica,))
        node = self._node(request.target)
        if node.node_id == ray.get_runtime_context().get_node_id():
            raise ConfigError(
                f"{node.name} runs bora's controller and cannot be drained while it serves; "
                f"`bora down` stops everything on it"
            )
        text = f"bora drain {request.target}"
        self._drained.add(node.node_id)
        await asyncio.to_thread(self._drain_node, node.node_id, text, request.timeout_s)
        self._events.note(
            time.time(),
            "drained",
            f"node {node.name}: draining",
            node=node.name,
            reason="asked for",
        )
        there = [each.replica for each in self._registry.reports if each.node_id == node.node_id]
        there += self._retire_gangs(node.node_id, request.timeout_s)
        return Drained(node_id=node.node_id, replicas=tuple(there))

    def _retire_gangs(self, node_id: str, timeout_s: float) -> list[str]:
        """Those with a follower on a node: Serve, which moves replicas, knows of leaders only."""
        gangs = [
            each
            for each in self._registry.reports
            if node_id in {follower.node_id for follower in each.followers}
        ]
        for each in gangs:
            if each.replica not in self._retiring:
                key = GenerationKey(each.variant, each.version)
                self._retire(each, key, replaced=True, timeout_s=timeout_s)
        return [each.replica for each in gangs]

    def _node(self, name: str) -> NodeFacts:
        nodes = self._census.nodes.values() if self._census else ()
        found = [node for node in nodes if name in (node.name, node.node_id)]
        found = found or [node for node in nodes if node.name.rpartition("-")[0] == name]
        if len(found) > 1:
            names = ", ".join(node.name for node in found)
            raise ConfigError(f"{name} could be any of {names}; give one of these names")
        if not found:
            known = {node.name for node in nodes} | {r.replica for r in self._registry.reports}
            raise UnknownName("replica or node", name, known)
        return found[0]

    # Going by itself

    async def look(self, *, act: bool) -> bool:
        """Take a census and do what follows from it; True when endpoints may have changed.

        `act`: replicas have had the time to report, so that who is missing is missing.
        """
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
            try:
                await self._let_go(now)
                await self._roll(now)
            except (ray.exceptions.RayError, ValueError) as error:
                log.warning("Serve is busy or restarting: %r", error)  # the next census comes
        self.places.compare(self._variants(), now, self._drained)
        return changed

    def _bury(self, now: Census) -> bool:
        """Replicas whose process is gone, of which no heartbeat will tell."""
        known = {each.replica for served in now.generations.values() for each in served.replicas}
        lost = self._registry.lost(known, now.begun_s)
        for report in lost:
            if report.state not in ("failed", "draining"):
                self._events.lost(time.time(), report, "its process is gone")
        return bool(lost)

    async def _let_go(self, now: Census) -> None:
        """Lower Serve's counts for those that have ended, or whatever else a count differs by."""
        alive = {
            each.replica
            for served in now.generations.values()
            for each in served.replicas
            if each.state in RUNNING
        }
        self._retiring = {key: each for key, each in self._retiring.items() if key in alive}
        variants = self._variants()
        counts = self.counts(variants)
        for variant in variants:
            key, count = key_of(variant), counts[variant.variant]
            served = now.generations.get(key)
            # Serve has not taken one without a configuration over yet.
            if served and served.config and not served.deleting and served.target != count:
                await self._deployer.scale(key, count)
        models = {"", *(variant.model for variant in variants)}
        for key, served in now.generations.items():
            if served.model not in models and not served.deleting:
                await self._deployer.delete(key)  # of a model that went before Serve knew it

    async def _roll(self, now: Census) -> None:
        """One step of every model's roll-out."""
        variants = self._variants()
        wanted = {key_of(variant) for variant in variants}
        self.prefetch.keep(wanted)
        for model in {variant.model for variant in variants}:
            all_ = {key: d for key, d in now.generations.items() if d.model == model}
            served = {key: d for key, d in all_.items() if not d.deleting}
            old = {key: self._outgoing(key, d) for key, d in served.items() if key not in wanted}
            if any(d.count("STOPPING") for key, d in all_.items() if key not in wanted):
                self._freed_s[model] = now.begun_s
            if not old:
                if self._rollouts.pop(model, ""):
                    self._note(model, "rollout", "done")
                continue
            new = {key: d for key, d in served.items() if key in wanted}
            there = self._fetched(model, [served[key] for key in old], now)
            targets: dict[GenerationKey, int] = {}
            for only_reads in (False, True):  # neither can stand in for the other
                coming = {key: d for key, d in new.items() if d.only_reads == only_reads}
                leaving = {k: each for k, each in old.items() if served[k].only_reads == only_reads}
                incoming = self._incoming(model, coming, now, fetched=there)
                promised = self._promised(model, ("prefill",) if only_reads else _ANSWERING)
                targets |= outgoing_targets(leaving, incoming, promised)
            if targets != {key: each.target for key, each in old.items()}:
                self._freed_s[model] = now.begun_s
            await self._step(targets, old)
            incoming = self._incoming(model, new, now, fetched=there)
            self._tell(model, old, incoming, self._promised(model, ("prefill", *_ANSWERING)))

    def _promised(self, model: str, roles: Collection[Role]) -> int:
        found = [each for each in self._variants_of(model) if each.role in roles]
        return sum(map(self._autoscaler.target, found))

    def _fetched(self, model: str, old: Iterable[Deployed], now: Census) -> bool:
        """Whether weights of what comes are wherever the model serves; they are brought there."""
        homes = {each.node_id for one in old for each in one.replicas if each.state in RUNNING}
        nodes = [(home, now.nodes[home].name, now.nodes[home].pool) for home in sorted(homes)
                 if home in now.nodes]  # fmt: skip
        return self.prefetch.want(self._variants_of(model), nodes)

    def _variants_of(self, model: str) -> list[Variant]:
        return [variant for variant in self._variants() if variant.model == model]

    def _outgoing(self, key: GenerationKey, served: Deployed) -> Outgoing:
        reports = self._registry.of_generation(key)
        return Outgoing(
            target=served.target,
            running=served.count(*RUNNING),
            ready=sum(report.state == "ready" for report in reports),
            stopping=served.count("STOPPING"),
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

    async def _step(
        self, targets: Mapping[GenerationKey, int], old: Mapping[GenerationKey, Outgoing]
    ) -> None:
        for key, target in targets.items():
            if target == 0:
                await self._deployer.delete(key)
            elif target != old[key].target:
                await self._deployer.scale(key, target)

    def _tell(
        self, model: str, old: Mapping[GenerationKey, Outgoing], new: Incoming, promised: int
    ) -> None:
        count = sum(each.ready for each in old.values())
        text = f"{new.ready} of {promised} in the new shape, {count} in the old one"
        if new.failing or new.gave_up:
            text = f"stopped, its engine does not start: {text}"
            if not self._rollouts.get(model, "").startswith("stopped"):
                self._note(model, "rollout", text)
        elif model not in self._rollouts:
            self._note(model, "rollout", "begun")
        if why := self.prefetch.failure(self._variants_of(model)):
            text = f"stopped, its weights cannot be fetched: {why}"
        if stage := self.prefetch.stage(self._variants_of(model)):
            text += f"; {stage}"
        self._rollouts[model] = text

    def _note(self, model: str, kind: EventKind, text: str) -> None:
        self._events.note(time.time(), kind, text, model=model)


def _business(report: ReplicaReport) -> tuple[int, float]:
    """The idlest first, of the idle ones the newest: its cache is the coldest."""
    return report.running + report.waiting, -report.started_s
