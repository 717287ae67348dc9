"""From the labels of a Ray cluster's nodes to an inventory, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.names import GPU_LABEL, KV_CACHE_LABEL, MEMORY_LABEL, POOL_LABEL, SLOT
from placement.errors import ConfigError
from placement.inventory import Inventory, Pool


def node_labels(pool: Pool) -> dict[str, str]:
    """Labels that a node of `pool` is started with."""
    labels = {POOL_LABEL: pool.name, GPU_LABEL: pool.gpu}
    if pool.memory_gib_per_gpu is not None:
        labels[MEMORY_LABEL] = str(pool.memory_gib_per_gpu)
    if pool.kv_cache_gib_per_gpu is not None:
        labels[KV_CACHE_LABEL] = str(pool.kv_cache_gib_per_gpu)
    return {**pool.labels, **labels}


def ray_inventory(nodes: Sequence[Mapping[str, Any]]) -> Inventory:
    """`nodes` as `ray.nodes()` gives them; dead ones and those without a pool label are left out.

    Raises:
        ConfigError: no node has the labels, or the nodes of a pool differ.
    """
    pools: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for node in nodes:
        pool = node["Labels"].get(POOL_LABEL)
        if node["Alive"] and pool:
            pools[pool].append(node)
    if not pools:
        raise ConfigError(
            f"no node of the Ray cluster carries the labels {POOL_LABEL} and {GPU_LABEL}; start "
            f"nodes with `ray start --labels {POOL_LABEL}=NAME,{GPU_LABEL}=TYPE`"
        )
    return Inventory(pools=tuple(_pool(name, pools[name]) for name in sorted(pools)))


def node_name(node: Mapping[str, Any]) -> str:
    """What plans and status call a node of `ray.nodes()`: two Ray nodes may share a host."""
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:8]}"


def _pool(name: str, nodes: Sequence[Mapping[str, Any]]) -> Pool:
    forms = {(node["Labels"].get(GPU_LABEL), _devices(node)) for node in nodes}
    if len(forms) > 1:
        raise ConfigError(f"the nodes of pool {name} differ in GPU type or count: {sorted(forms)}")
    labels = nodes[0]["Labels"]
    [(gpu, devices)] = forms
    if gpu is None or devices == 0:
        raise ConfigError(
            f"the nodes of pool {name} have no {GPU_LABEL} label, or no GPU and no {SLOT}"
        )
    memory, kv_cache = labels.get(MEMORY_LABEL), labels.get(KV_CACHE_LABEL)
    return Pool(
        name=name,
        gpu=gpu,
        nodes=len(nodes),
        gpus_per_node=devices,
        memory_gib_per_gpu=float(memory) if memory else None,
        kv_cache_gib_per_gpu=float(kv_cache) if kv_cache else None,
        labels=_common_labels(nodes),
        node_names=tuple(sorted(node_name(node) for node in nodes)),
    )


def _common_labels(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The operator's own (zone, rack ...) that all nodes of the pool share; not Ray's, not ours."""
    first, *others = (node["Labels"] for node in nodes)
    return {
        key: value
        for key, value in first.items()
        if not key.startswith(("ray.io/", "bora."))
        and all(labels.get(key) == value for labels in others)
    }


def _devices(node: Mapping[str, Any]) -> int:
    resources = node["Resources"]
    return int(resources.get("GPU", 0) or resources.get(SLOT, 0))
