"""Planned against actual places, and why a replica finds none. No Ray, no clock."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.messages import RankPlace, ReplicaReport
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
    return _missing(variant, bundle, nodes) + _lost(variant, nodes)


def _lost(variant: Variant, nodes: Sequence[NodeFacts]) -> str:
    """Nodes that the plan has for gangs, and that are not to be had."""
    planned = {part.node for replica in variant.placement for part in replica}
    live = {node.name: node for node in nodes}
    if variant.shape.num_nodes == 1 or not planned & set(live):
        return ""  # planned on an inventory with other names
    lost = [f"{name} is gone" for name in sorted(planned - set(live))]
    lost += [f"{name} is drained" for name in sorted(planned & set(live)) if live[name].draining]
    return f"; of the planned nodes {' and '.join(lost)}" if lost else ""


def _missing(variant: Variant, bundle: Mapping[str, float], nodes: Sequence[NodeFacts]) -> str:
    [(resource, needed)] = bundle.items()
    count = variant.shape.num_nodes
    on = "one node" if count == 1 else f"each of {count} nodes"
    wish = f"{needed:g} {resource} on {on} of pool {' and '.join(dict.fromkeys(variant.pools))}"
    pool = [node for node in nodes if node.pool in variant.pools]
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
    fitting = sum(node.total.get(resource, 0.0) >= needed for node in usable)
    if fitting < count:
        return (
            f"a replica can never be placed: it needs {wish}, which has {fitting} such; deploy a "
            f"fleet with a smaller nodes_per_replica, or add nodes"
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
        found += _of_replica(variant, report, nodes)
        found += (shared or {}).get(report.replica, ())
    variant = with_stand_ins(variant, nodes)
    if not _planned(variant).keys() & {node.name for node in nodes.values()}:
        return found  # planned on an inventory with other names
    found += _other_nodes(variant, reports, nodes) + _other_gpus(variant, reports, nodes)
    return found + _other_ranks(variant, reports, nodes)


def with_stand_ins(variant: Variant, nodes: Mapping[str, NodeFacts]) -> Variant:
    """The plan of it, where a host that came back under a new Ray id keeps its part.

    Nodes are called HOST-ID; a planned one that is gone is stood in for by the only node of its
    host and pool that the plan does not name.
    """
    alive, planned = {node.name for node in nodes.values()}, _planned(variant).keys()
    others = {node.name for node in nodes.values() if node.pool in variant.pools} - planned
    instead: dict[str, str] = {}
    for gone in sorted(planned - alive):
        host = gone.rpartition("-")[0]
        back = [name for name in others - {*instead.values()} if name.rpartition("-")[0] == host]
        if host and len(back) == 1:
            instead[gone] = back[0]
    placement = tuple(
        tuple(part.model_copy(update={"node": instead.get(part.node, part.node)}) for part in parts)
        for parts in variant.placement
    )
    return variant.model_copy(update={"placement": placement})


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A replica on a node where the plan has fewer, and one that lacks it and has room."""

    model: str
    replica: str
    to: NodeFacts
    text: str


def misplaced(
    variant: Variant,
    bundle: Mapping[str, float],
    reports: Sequence[ReplicaReport],
    nodes: Mapping[str, NodeFacts],
) -> Misplaced | None:
    """The replica to move first, the idlest of those; None: all are in place, or there is no room.

    For variants on one node. `nodes` are those that take replicas.
    """
    variant = with_stand_ins(variant, nodes)
    planned = _planned(variant)
    placed = Counter(nodes[each.node_id].name for each in reports if each.node_id in nodes)
    [(resource, needed)] = bundle.items()
    rooms = [
        node
        for node in sorted(nodes.values(), key=lambda node: node.name)
        if planned[node.name] > placed[node.name]
        and node.pool in variant.pools
        and node.free.get(resource, 0.0) >= needed
    ]
    surplus = [
        each
        for each in reports
        if each.node_id in nodes
        and placed[nodes[each.node_id].name] > planned[nodes[each.node_id].name]
    ]
    if not rooms or not surplus:
        return None
    here = {(part.node, part.gpus) for parts in variant.placement for part in parts}
    leaver = min(
        surplus,
        key=lambda each: (
            (nodes[each.node_id].name, each.gpus) in here,
            each.running + each.waiting,
            each.replica,
        ),
    )
    text = f"{leaver.replica} on {nodes[leaver.node_id].name}, planned on {rooms[0].name}"
    return Misplaced(variant.model, leaver.replica, rooms[0], text)


def _planned(variant: Variant) -> Counter[str]:
    """Replicas, or parts of them, by node."""
    return Counter(part.node for replica in variant.placement for part in replica)


def _parts(report: ReplicaReport) -> tuple[ReplicaReport | RankPlace, ...]:
    """What is on each of its nodes, by rank."""
    return (report, *report.followers)


def _of_replica(
    variant: Variant, report: ReplicaReport, nodes: Mapping[str, NodeFacts]
) -> list[str]:
    found = [
        f"{report.replica} runs on {node.name} of pool {node.pool or '(none)'}, planned was pool "
        f"{' and '.join(dict.fromkeys(variant.pools))}"
        for node in (nodes[part.node_id] for part in _parts(report) if part.node_id in nodes)
        if node.pool not in variant.pools
    ]
    held = sum(part.num_devices for part in _parts(report))
    if held and held != variant.gpus_per_replica:
        found.append(f"{report.replica} holds {held} GPUs, planned were {variant.gpus_per_replica}")
    planned, actual = variant.shape.per_gpu.weights_bytes, report.weights_bytes
    if planned and actual and abs(actual - planned) > _MEMORY_TOLERANCE * planned:
        found.append(
            f"{report.replica}: weights take {actual / 2**30:.2f} GiB a GPU, planned were "
            f"{planned / 2**30:.2f}"
        )
    return found


def shared_gpus(reports: Iterable[ReplicaReport]) -> dict[str, list[str]]:
    """GPUs that two replicas hold, by the one of the two whose id comes first."""
    holders: defaultdict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.replica):
        for part in _parts(report):
            for gpu in part.gpus if part.node_id else ():
                holders[part.node_id, gpu].append((report.replica, part.node))
    found: defaultdict[str, list[str]] = defaultdict(list)
    for (_, gpu), there in sorted(holders.items()):
        for (one, node), (other, _) in itertools.combinations(there, 2):
            found[one].append(f"{one} and {other} both hold GPU {gpu} of {node}")
    return dict(found)


def _other_nodes(
    variant: Variant, reports: Sequence[ReplicaReport], nodes: Mapping[str, NodeFacts]
) -> list[str]:
    """Replicas on nodes where the plan has fewer of them. Beyond the plan's count any node will do."""
    planned = _planned(variant)
    placed = Counter(
        nodes[part.node_id].name
        for report in reports
        for part in _parts(report)
        if part.node_id in nodes
    )
    missing = planned - placed
    surplus = placed - planned
    if not missing or not surplus:
        return []
    gone = sorted(missing.keys() - {node.name for node in nodes.values()})
    why = f" ({', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone)" if gone else ""
    return [f"planned on {_counts(missing)}, runs on {_counts(surplus)} instead{why}"]


def _other_ranks(
    variant: Variant, reports: Sequence[ReplicaReport], nodes: Mapping[str, NodeFacts]
) -> list[str]:
    """Gangs on planned nodes, but not on those of one planned replica, or not in its order."""
    if variant.shape.num_nodes == 1:
        return []
    planned = [[part.node for part in replica] for replica in variant.placement]
    known = {name for names in planned for name in names}
    found = []
    for report in reports:
        there = [nodes[part.node_id].name for part in _parts(report) if part.node_id in nodes]
        whole = len(there) == variant.shape.num_nodes and set(there) <= known
        if whole and there not in planned:
            wanted = " or ".join(dict.fromkeys(", ".join(names) for names in planned))
            ranks = ", ".join(there)
            found.append(f"{report.replica}: its ranks are on {ranks}, planned were {wanted}")
    return found


def _other_gpus(
    variant: Variant, reports: Sequence[ReplicaReport], nodes: Mapping[str, NodeFacts]
) -> list[str]:
    """Replicas beside the GPUs that the plan has for them on their node, while those are unused."""
    placed = [
        (report.replica, nodes[part.node_id].name, part.gpus)
        for report in reports
        for part in _parts(report)
        if part.gpus and part.node_id in nodes
    ]
    planned = Counter((part.node, part.gpus) for replica in variant.placement for part in replica)
    unused = planned - Counter((node, gpus) for _, node, gpus in placed)
    found = []
    for replica, node, gpus in placed:
        instead = [wanted for name, wanted in unused if name == node]
        if instead and (node, gpus) not in planned:
            found.append(f"{replica} runs on GPU {_list(gpus)} of {node}, not {_list(instead[0])}")
    return found


def _list(gpus: Iterable[int]) -> str:
    return ", ".join(map(str, gpus))


def _counts(nodes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(nodes.items()))
