"""On which nodes the ranks of a gang belong: those of the plan, as long as these are to be had.

Serve takes one wish for all replicas of a deployment, when it is created. So nodes are pinned where
the plan has one replica, and let go, by creating it anew, only while that does not run. No Ray, no
clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from cluster.generations import RUNNING, Deployed
from cluster.placement_check import NodeFacts
from placement.plan import Variant

PATIENCE_S = 15.0  # for planned nodes that others use, before any node of the pool will do


def planned_pins(variant: Variant, ids: Mapping[str, str]) -> tuple[str, ...]:
    """Ray's ids of a gang's planned nodes, by rank; `ids` of live nodes by their names.

    Empty: it may have several replicas, or was planned on nodes that are not there.
    """
    if variant.shape.num_nodes == 1 or variant.bounds.max > 1 or len(variant.placement) != 1:
        return ()
    names = [part.node for part in variant.placement[0]]
    return tuple(ids[name] for name in names) if set(names) <= set(ids) else ()


def why_elsewhere(
    pins: Sequence[str],
    served: Deployed,
    placeless: Collection[str],
    nodes: Mapping[str, NodeFacts],
    *,
    drained: Collection[str],
    now_s: float,
    patient: bool,
) -> str:
    """Why a gang cannot have the nodes that it is pinned to; empty: it runs, or may yet.

    `now_s`: epoch seconds. `patient`: those that leave these nodes are known, and waited for.
    """
    waiting = [each for each in served.replicas if each.replica in placeless]
    if not waiting or served.count(*RUNNING):
        return ""
    for pin in pins:
        if pin not in nodes:
            return f"node {pin[:8]} is gone"
        if pin in drained:
            return f"{nodes[pin].name} is drained"
    if patient or now_s - min(each.started_s for each in waiting) < PATIENCE_S:
        return ""
    return f"{' and '.join(sorted({nodes[pin].name for pin in pins}))} are in use"


def rank_order(variant: Variant, nodes: Sequence[str]) -> tuple[int, ...]:
    """Which bundle each rank takes, so that ranks stand where the plan has them.

    `nodes` are those of the bundles, as plans name them; the first is the leader's, which is rank 0.
    Of the planned replicas the one counts that has most of these nodes, the leader's before all.
    """
    here = Counter(nodes)

    def alike(names: Sequence[str]) -> tuple[bool, int]:
        return names[0] == nodes[0], (Counter(names) & here).total()

    planned = [[part.node for part in replica] for replica in variant.placement]
    wanted = max((names for names in planned if len(names) == len(nodes)), key=alike, default=nodes)
    pools, left = variant.rank_pools, set(range(1, len(nodes)))
    order = {0: 0}
    for exact in (True, False):
        for rank in range(1, len(nodes)):
            fitting = [
                bundle
                for bundle in sorted(left)
                if pools[bundle] == pools[rank] and (nodes[bundle] == wanted[rank] or not exact)
            ]
            if rank not in order and fitting:
                order[rank] = fitting[0]
                left.remove(fitting[0])
    return tuple(order[rank] for rank in range(len(nodes)))
