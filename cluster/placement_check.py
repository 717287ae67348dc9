"""Planned against actual places, and why a replica finds none. No Ray, no clock."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.messages import ReplicaReport
from placement.plan import Variant

_MEMORY_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A live node of the Ray cluster."""

    node_id: str
    name: str
    pool: str
    total: Mapping[str, float]  # Ray resources
    free: Mapping[str, float]
    draining: bool = False


def explain_waiting(
    variant: Variant, bundle: Mapping[str, float], nodes: Sequence[NodeFacts]
) -> str:
    """Which resource is missing where, for a replica that Ray has no place for."""
    [(resource, needed)] = bundle.items()
    wish = f"{needed:g} {resource} on one node of pool {variant.pool}"
    pool = [node for node in nodes if node.pool == variant.pool]
    if not pool:
        return f"a replica waits for {wish}: no node of that pool is alive"
    usable = [node for node in pool if not node.draining]
    if not usable:
        return f"a replica waits for {wish}: all of its nodes are draining"
    largest = max(node.total.get(resource, 0.0) for node in usable)
    if largest < needed:
        return (
            f"a replica can never be placed: it needs {wish}, where no node has more than "
            f"{largest:g}; deploy a fleet with smaller replicas, or add larger nodes"
        )
    free = ", ".join(
        f"{node.name} has {node.free.get(resource, 0.0):g} of {node.total.get(resource, 0.0):g} free"
        for node in sorted(usable, key=lambda node: node.name)
    )
    return f"a replica waits for {wish}: {free}"


def differences(
    variant: Variant,
    reports: Iterable[ReplicaReport],
    nodes: Mapping[str, NodeFacts],
    shared: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """What is not as planned about the places of `variant`'s replicas; empty: all is.

    `shared` is what `shared_gpus` finds among the replicas of all variants.
    """
    reports = [report for report in reports if report.node_id]
    found: list[str] = []
    for report in reports:
        found += _of_replica(variant, report, nodes.get(report.node_id))
        found += (shared or {}).get(report.replica, ())
    return found + _other_nodes(variant, reports, nodes)


def _of_replica(variant: Variant, report: ReplicaReport, node: NodeFacts | None) -> list[str]:
    found = []
    if node is not None and node.pool != variant.pool:
        found.append(
            f"{report.replica} runs on {node.name} of pool {node.pool or '(none)'}, planned was "
            f"pool {variant.pool}"
        )
    if report.num_devices and report.num_devices != variant.gpus_per_replica:
        found.append(
            f"{report.replica} holds {report.num_devices} GPUs, planned were "
            f"{variant.gpus_per_replica}"
        )
    planned, actual = variant.shape.per_gpu.weights_bytes, report.weights_bytes
    if planned and actual and abs(actual - planned) > _MEMORY_TOLERANCE * planned:
        found.append(
            f"{report.replica}: weights take {actual / 2**30:.2f} GiB a GPU, planned were "
            f"{planned / 2**30:.2f}"
        )
    return found


def shared_gpus(reports: Iterable[ReplicaReport]) -> dict[str, list[str]]:
    """GPUs that two replicas hold, by the one of the two whose id comes first."""
    holders: defaultdict[tuple[str, int], list[ReplicaReport]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.replica):
        for gpu in report.gpus if report.node_id else ():
            holders[report.node_id, gpu].append(report)
    found: defaultdict[str, list[str]] = defaultdict(list)
    for (_, gpu), there in sorted(holders.items()):
        for one, other in itertools.combinations(there, 2):
            text = f"{one.replica} and {other.replica} both hold GPU {gpu} of {one.node}"
            found[one.replica].append(text)
    return dict(found)


def _other_nodes(
    variant: Variant, reports: Sequence[ReplicaReport], nodes: Mapping[str, NodeFacts]
) -> list[str]:
    """Replicas on nodes where the plan has fewer of them. Beyond the plan's count any node will do."""
    planned = Counter(replica[0].node for replica in variant.placement if replica)
    known = {node.name for node in nodes.values()}
    if not planned or not planned.keys() <= known:  # planned on an inventory with other names
        return []
    placed = Counter(nodes[each.node_id].name for each in reports if each.node_id in nodes)
    missing = planned - placed
    surplus = placed - planned
    if not missing or not surplus:
        return []
    return [f"planned on {_counts(missing)}, runs on {_counts(surplus)} instead"]


def _counts(nodes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(nodes.items()))
