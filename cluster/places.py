"""Places: where replicas run, compared with the plan, and why some have no place."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cluster.event_log import EventLog
from cluster.generations import STOPPING, Census, ServedReplica, bundle, key_of
from cluster.messages import EventKind
from cluster.placement_check import NodeFacts, differences, explain_waiting, shared_gpus
from cluster.registry import Registry
from placement.plan import Variant

SILENT_S = 120.0  # a worker starts and imports in ten seconds, on a busy host in a minute


class Places:
    """What the last census showed. What is new is told to `events`."""

    def __init__(self, registry: Registry, events: EventLog) -> None:
        self._registry = registry
        self._events = events
        self._waiting: dict[str, str] = {}  # by variant
        self._misplaced: dict[str, tuple[str, ...]] = {}  # by variant

    def waiting(self, variant: str) -> str:
        """Which resource is missing where for a replica of it; empty: none waits."""
        return self._waiting.get(variant, "")

    def misplaced(self, variant: str) -> tuple[str, ...]:
        """What is not as planned about its replicas' places and memory."""
        return self._misplaced.get(variant, ())

    def compare(self, variants: Sequence[Variant], now: Census, drained: Collection[str]) -> None:
        """Planned against actual; `drained` are nodes (Ray's ids) that take nothing more."""
        nodes = {
            node_id: replace(node, draining=node_id in drained)
            for node_id, node in now.nodes.items()
        }
        shared = shared_gpus(self._registry.reports)
        for variant in variants:
            served = now.generations.get(key_of(variant))
            replicas = (
                [each for each in served.replicas if each.state != STOPPING] if served else []
            )
            waits = ""
            if any(replica.replica in now.placeless for replica in replicas):
                waits = explain_waiting(variant, bundle(variant), tuple(nodes.values()))
            elif silent := [each for each in replicas if self._silent(each)]:
                waits = _explain_silence(silent[0], nodes)
            if waits and not self.waiting(variant.variant):
                self._note(variant, "no-place", waits)
            self._waiting[variant.variant] = waits
            reports = self._registry.of_generation(key_of(variant))
            found = differences(variant, reports, nodes, shared)
            for text in found:
                if text not in self.misplaced(variant.variant):
                    self._note(variant, "mismatch", f"not as planned: {text}")
            self._misplaced[variant.variant] = tuple(found)

    def _note(self, variant: Variant, kind: EventKind, text: str) -> None:
        self._events.note(time.time(), kind, text, model=variant.model)

    def _silent(self, replica: ServedReplica) -> bool:
        """Whether it should have said by now what it is doing: it has a place, or needs none."""
        starting = replica.state == "STARTING" and self._registry.get(replica.replica) is None
        return starting and time.time() - replica.started_s > SILENT_S


def _explain_silence(replica: ServedReplica, nodes: Mapping[str, NodeFacts]) -> str:
    node = nodes[replica.node_id].name if replica.node_id in nodes else "a node"
    return (
        f"{replica.replica} has a place on {node}, but after {SILENT_S:.0f} s its process says "
        f"nothing: look in that node's Ray logs (worker-*.err, runtime_env*.log), whether bora is "
        f"installed there, and whether the node reaches the head (`bora doctor`)"
    )
