"""Which GPUs are still free, and which of them a replica gets: the first that suffice."""

from __future__ import annotations

from placement.inventory import Inventory, Pool
from placement.plan import NodeGpus

ReplicaGpus = tuple[NodeGpus, ...]


class FreeGpus:
    """The GPUs that no replica has taken yet, by pool and node."""

    def __init__(self, inventory: Inventory) -> None:
        self._free = {
            pool.name: {node: list(range(pool.gpus_per_node)) for node in pool.names()}
            for pool in inventory.pools
        }

    def in_pool(self, pool: Pool) -> int:
        """How many GPUs of `pool` are free."""
        return sum(len(gpus) for gpus in self._free[pool.name].values())

    def replicas_that_fit(self, pool: Pool, gpus_per_replica: int) -> int:
        """How many replicas `pool` could still take, each inside one node."""
        return sum(len(gpus) // gpus_per_replica for gpus in self._free[pool.name].values())

    def take(self, pool: Pool, gpus_per_replica: int, replicas: int) -> tuple[ReplicaGpus, ...]:
        """Take GPUs for `replicas`: the first nodes with room, their lowest free indices.

        Raises:
            ValueError: they do not fit; nothing was taken.
        """
        if self.replicas_that_fit(pool, gpus_per_replica) < replicas:
            raise ValueError(f"{replicas} replicas of {gpus_per_replica} GPUs exceed {pool.name}")
        taken: list[ReplicaGpus] = []
        for node, gpus in self._free[pool.name].items():
            while len(taken) < replicas and len(gpus) >= gpus_per_replica:
                mine, gpus[:] = gpus[:gpus_per_replica], gpus[gpus_per_replica:]
                taken.append((NodeGpus(node=node, gpus=tuple(mine)),))
        return tuple(taken)
