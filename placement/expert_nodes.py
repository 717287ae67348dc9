"""Replicas of mixtures of experts over several nodes of a pool, for models that outgrow one node.

Each node has copies of the attention, and the experts are spread over all GPUs: on the fewest nodes
that hold the model so, for more would cost more and could be replicas instead.
"""

from __future__ import annotations

from placement.candidate import Candidate
from placement.candidates import candidates
from placement.catalogue import Catalogue
from placement.fleet import FleetModel
from placement.legality import first_rejection
from placement.node_groups import NodeGroup

_MOST_NODES = 8


def over_fewest_nodes(wish: FleetModel, group: NodeGroup, catalogue: Catalogue) -> list[Candidate]:
    """Candidates on the fewest nodes of the group on which one is legal; else on most nodes.

    Nothing for a fleet that has said how many nodes, or which layers where, for dense models, and on
    CPUs, which are no faster for it.
    """
    asked = wish.nodes_per_replica > 1 or wish.layer_partition or wish.data_parallel_size == 1
    if asked or catalogue.model(wish.model).architecture.moe is None:
        return []
    found: list[Candidate] = []
    for nodes in range(2, min(group.usable.nodes, _MOST_NODES) + 1):
        wide = wish.model_copy(update={"nodes_per_replica": nodes})
        found = [
            candidate
            for candidate in candidates(wide, group.pool, catalogue)
            if candidate.data_parallel_size > 1 and not candidate.device.is_cpu
        ]
        if any(first_rejection(candidate) is None for candidate in found):
            break
    return found
