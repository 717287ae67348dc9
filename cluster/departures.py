"""Departures: replicas that go on purpose, as fewer are wanted or because a node is emptied.

Serve can be told how many replicas there should be, not which one should go. So the one that bora
chooses drains and ends its process, and only then is Serve's count lowered: the successor that Serve
began at once is the first that it takes back, long before an engine starts in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.autoscaler import Autoscaler
from cluster.event_log import EventLog
from cluster.generations import GenerationKey, key_of
from cluster.messages import Drained, DrainRequest, ReplicaReport
from cluster.placement_check import NodeFacts
from cluster.registry import Registry
from placement.errors import ConfigError, UnknownName
from placement.plan import Variant


class Scales(Protocol):
    """What Serve is asked for."""

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        """Set a generation's replica count."""
        ...


@dataclass(frozen=True, slots=True)
class _Retirement:
    """A replica that was told to go."""

    key: GenerationKey
    timeout_s: float
    replaced: bool  # the count stays: Serve starts a successor


class Departures:
    """Who was told to go, and which nodes take nothing more.

    `nodes()` are those of the last census, by Ray's id; `drain_node` empties one
    (`cluster.census`). What happens is told to `events`.
    """

    def __init__(
        self,
        registry: Registry,
        autoscaler: Autoscaler,
        deployer: Scales,
        events: EventLog,
        *,
        nodes: Callable[[], Mapping[str, NodeFacts]],
        drain_node: Callable[[str, str, float], None],
    ) -> None:
        self._registry = registry
        self._autoscaler = autoscaler
        self._deployer = deployer
        self._events = events
        self._nodes = nodes
        self._drain_node = drain_node
        self._retiring: dict[str, _Retirement] = {}
        self._drained: dict[str, float] = {}  # Ray's ids of nodes: how long replicas may take
        self._extra: set[GenerationKey] = set()

    @property
    def drained(self) -> Collection[str]:
        """Nodes (Ray's ids) that Ray will place nothing on."""
        return self._drained.keys()

    def order_for(self, replica: str) -> float | None:
        """Seconds within which a replica must finish and go; None: it stays."""
        retirement = self._retiring.get(replica)
        return retirement.timeout_s if retirement else None

    def counts(self, variants: Iterable[Variant]) -> dict[str, int]:
        """What Serve must aim at: the wanted ones, and those beside them for a while."""
        return {
            variant.variant: self._autoscaler.target(variant) + self._beside(key_of(variant))
            for variant in variants
        }

    def more(self, key: GenerationKey) -> None:
        """One replica more than is wanted, until `no_more`."""
        self._extra.add(key)

    def no_more(self, key: GenerationKey) -> None:
        """As many as are wanted."""
        self._extra.discard(key)

    def retire(self, report: ReplicaReport, key: GenerationKey) -> None:
        """Let this replica finish what runs and go, without a successor."""
        if report.replica not in self._retiring:
            self._retire(report, key, replaced=False, reason="another serves where it was planned")

    def _beside(self, key: GenerationKey) -> int:
        """Those that leave but still live, and one that is to take another's place."""
        return self._leaving(key) + (key in self._extra)

    def _leaving(self, key: GenerationKey) -> int:
        return sum(each.key == key and not each.replaced for each in self._retiring.values())

    def forget_all_but(self, alive: Collection[str]) -> None:
        """The others have gone."""
        self._retiring = {key: each for key, each in self._retiring.items() if key in alive}

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
        await self._deployer.scale(key, replicas + self._beside(key))

    def _retire(
        self,
        report: ReplicaReport,
        key: GenerationKey,
        *,
        replaced: bool,
        timeout_s: float = 600.0,
        reason: str = "",
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
            reason=reason
            or ("asked for, another takes its place" if replaced else "fewer are wanted"),
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
        text = f"bora drain {request.target}"
        await asyncio.to_thread(self._drain_node, node.node_id, text, request.timeout_s)
        self._drained[node.node_id] = request.timeout_s
        self._events.note(
            time.time(),
            "drained",
            f"node {node.name}: draining",
            node=node.name,
            reason="asked for",
        )
        self.clear_of_gangs()
        there = [
            each.replica
            for each in self._registry.reports
            if node.node_id in {each.node_id, *(follower.node_id for follower in each.followers)}
        ]
        return Drained(node_id=node.node_id, replicas=tuple(there))

    def clear_of_gangs(self) -> None:
        """Tell gangs on drained nodes to go, also those that were just coming up there.

        Serve, which moves replicas, knows of leaders only, and waits for a successor, which a gang
        that must be on the drained node cannot have.
        """
        for each in tuple(self._registry.reports):
            places = (each.node_id, *(follower.node_id for follower in each.followers))
            limits = [self._drained[node_id] for node_id in places if node_id in self._drained]
            stays = each.state in ("starting", "ready", "unhealthy")
            if each.followers and limits and stays and each.replica not in self._retiring:
                key = GenerationKey(each.variant, each.version)
                self._retire(each, key, replaced=True, timeout_s=min(limits))

    def _node(self, name: str) -> NodeFacts:
        nodes = self._nodes().values()
        found = [node for node in nodes if name in (node.name, node.node_id)]
        found = found or [node for node in nodes if node.name.rpartition("-")[0] == name]
        if len(found) > 1:
            names = ", ".join(node.name for node in found)
            raise ConfigError(f"{name} could be any of {names}; give one of these names")
        if not found:
            known = {node.name for node in nodes} | {r.replica for r in self._registry.reports}
            raise UnknownName("replica or node", name, known)
        return found[0]


def _business(report: ReplicaReport) -> tuple[int, float]:
    """The idlest first, of the idle ones the newest: its cache is the coldest."""
    return report.running + report.waiting, -report.started_s
