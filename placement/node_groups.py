"""Nodes that a plan need not tell apart, over pools: counted as one, so that no symmetry is left."""

from __future__ import annotations

from dataclasses import dataclass, replace

from placement.catalogue import Catalogue
from placement.fleet import FleetSpec
from placement.inventory import Inventory, Pool
from placement.problem import Nodes


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Pools whose nodes are alike: GPUs, links, price, zone, and which models may use them."""

    pools: tuple[Pool, ...]  # by name; the first stands for all
    spare_nodes: int  # of each pool

    @property
    def pool(self) -> Pool:
        """The one that stands for all."""
        return self.pools[0]

    @property
    def name(self) -> str:
        """For messages."""
        return ", ".join(pool.name for pool in self.pools)

    def with_a_node_more(self) -> NodeGroup:
        """The group after one node was added to its largest pool."""
        largest = max(self.pools, key=lambda pool: pool.nodes)
        larger = largest.with_more_nodes(1)
        return replace(
            self, pools=tuple(larger if pool is largest else pool for pool in self.pools)
        )

    @property
    def usable(self) -> Nodes:
        """Nodes that may be used."""
        nodes = sum(max(0, pool.nodes - self.spare_nodes) for pool in self.pools)
        return Nodes(nodes=nodes, gpus_per_node=self.pool.gpus_per_node)

    def usable_nodes(self) -> dict[str, str]:
        """Names of the nodes that may be used, in order, and the pool of each."""
        return {
            node: pool.name
            for pool in self.pools
            for node in pool.names()[: max(0, pool.nodes - self.spare_nodes)]
        }


def node_groups(
    fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue
) -> tuple[NodeGroup, ...]:
    """The inventory's pools in groups, by the name of the first.

    Raises:
        UnknownName: the fleet restricts a model to a pool that is not there, or a pool has a GPU
            type that is not known.
    """
    for wish in fleet.models:
        for name in wish.pools or ():
            inventory.pool(name)
    allowed = sorted({wish.pools for wish in fleet.models if wish.pools is not None})
    # The nodes of one replica are of one pool, which counting nodes over pools would not see to.
    apart = any(wish.nodes_per_replica > 1 for wish in fleet.models)
    groups: dict[str, list[Pool]] = {}
    for pool in sorted(inventory.pools, key=lambda pool: pool.name):
        catalogue.gpu(pool.gpu)
        same = pool.model_copy(update={"name": "", "nodes": 0, "node_names": None, "gpu": ""})
        may = [pool.name in names for names in allowed]
        key = f"{catalogue.gpu(pool.gpu).name} {may} {same.model_dump_json()}"
        key += pool.name if apart else ""
        groups.setdefault(key, []).append(pool)
    return tuple(
        NodeGroup(pools=tuple(pools), spare_nodes=fleet.spare_nodes) for pools in groups.values()
    )
