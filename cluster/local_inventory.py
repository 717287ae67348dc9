"""What this machine offers, as an inventory of one node."""

from __future__ import annotations

import os

from cluster.errors import ClusterError
from cluster.probes.node import probe
from placement.catalogue import Catalogue
from placement.errors import UnknownName
from placement.found_inventory import pools_of
from placement.inventory import Inventory, Pool
from placement.node_facts import NodeFacts

POOL = "local"
GIB = 2**30
# A CPU rank of vLLM takes about 3 GB; less than this per slot and machines start to swap.
_MIN_GIB_PER_SLOT = 4.0
_MIN_SLOTS = 4  # nano models need no core of their own, so a small machine may oversubscribe
_KV_CACHE_GIB = 1.0


def local_inventory(catalogue: Catalogue, facts: NodeFacts | None = None) -> Inventory:
    """This machine's GPUs, or without any its CPU as slots that each hold one rank.

    A box with several GPU types, or with GPUs cut by MIG, has a pool for each kind. `facts`: of
    this machine, where they are known already.

    Raises:
        ClusterError: the driver does not answer, or a GPU is of an unknown type.
    """
    facts = facts or probe(measure=False)
    if not facts.gpus:
        if facts.problems:
            raise ClusterError(f"this machine's GPUs cannot be used: {'; '.join(facts.problems)}")
        return Inventory(pools=(_cpu_pool(facts),))
    pools = pools_of(facts, catalogue, POOL)
    for pool in pools:
        try:
            catalogue.gpu(pool.gpu)
        except UnknownName as error:
            names = ", ".join(sorted({gpu.name for gpu in facts.gpus}))
            raise ClusterError(f"this machine's GPUs are {names}: {error}") from error
    return Inventory(pools=pools)


def _cpu_pool(facts: NodeFacts) -> Pool:
    memory_gib = facts.host_memory_bytes / GIB
    wanted = max(_MIN_SLOTS, os.cpu_count() or 1)
    slots = max(1, min(wanted, int(memory_gib / _MIN_GIB_PER_SLOT)))
    return Pool(
        name=POOL,
        gpu="cpu",
        gpus_per_node=slots,
        memory_gib_per_gpu=round(memory_gib * 0.9 / slots, 2),
        kv_cache_gib_per_gpu=_KV_CACHE_GIB,
        host_memory_gib=round(memory_gib, 1),
        price_per_gpu_hour=0.0,
        node_names=(facts.host,),
    )
