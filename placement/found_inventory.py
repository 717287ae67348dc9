"""An inventory out of what was found: of one box as pools, of a declared one with true figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from placement.catalogue import Catalogue
from placement.gpu_names import gpu_type_of
from placement.inventory import Inventory, Links, Pool
from placement.mig import slice_name
from placement.mismatch import GIB
from placement.node_facts import GpuFacts, NodeFacts, PairFacts

_STEP_GIB = 0.1  # figures of nodes that are alike differ by less; a pool has one


def device_kinds(node: NodeFacts, catalogue: Catalogue) -> dict[str, tuple[str, ...]]:
    """UUIDs of the node's GPUs and MIG slices by GPU type, in the driver's order.

    A type that the catalogue does not have is called as the driver calls it, with dashes.
    """
    kinds: dict[str, tuple[str, ...]] = {}
    for gpu in node.gpus:
        known = gpu_type_of(gpu.name, gpu.memory_bytes, catalogue)
        name = known.name if known else _unknown_name(gpu)
        parts = [(slice_name(name, each.profile), each.uuid) for each in gpu.mig_slices]
        for kind, uuid in parts if gpu.mig else [(name, gpu.uuid)]:
            kinds[kind] = (*kinds.get(kind, ()), uuid)
    return kinds


def _unknown_name(gpu: GpuFacts) -> str:
    """Fit for a label; with the memory, since a known name may be on a card of another size."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", gpu.name).strip("-.") or "GPU"
    return f"{name}-{gpu.memory_bytes / GIB:.0f}GiB"


def with_findings(declared: Inventory, found: Sequence[NodeFacts]) -> Inventory:
    """`declared` with what was measured on its nodes, the weakest node of each pool deciding.

    Changed are memory per GPU, host memory, the link inside a node, the network between nodes and
    AMX; counts, types and prices stay: where those are wrong, `mismatches` says so.
    """
    pools = []
    for pool in declared.pools:
        own = _of_pool(pool, found)
        pools.append(_corrected(pool, own) if len(own) == pool.nodes else pool)
    return declared.model_copy(update={"pools": tuple(pools)})


def _of_pool(pool: Pool, found: Sequence[NodeFacts]) -> list[NodeFacts]:
    """By the nodes' names, else by those of their hosts, where several may be called alike.

    Of Ray nodes that share a host, those count whose label names the pool.
    """
    own = []
    for name in pool.names():
        exact = [node for node in found if node.node == name]
        hosts = [node for node in found if node.host == name and node.pool in ("", pool.name)]
        own += exact or hosts
    return own


def _corrected(pool: Pool, nodes: Sequence[NodeFacts]) -> Pool:
    changes: dict[str, object] = {
        "host_memory_gib": _floor(min(node.host_memory_bytes for node in nodes) / GIB)
    }
    if pool.gpu.lower() == "cpu":
        if all("amx_bf16" in node.cpu_features for node in nodes):
            changes["labels"] = {**pool.labels, "amx": "true"}
        return pool.model_copy(update=changes)
    gpus = [gpu for node in nodes for gpu in node.gpus]
    sizes = [gpu.torch_memory_bytes for gpu in gpus if gpu.torch_memory_bytes]
    alike = len({gpu.name for gpu in gpus}) == 1 and not any(gpu.mig for gpu in gpus)
    if alike and len(sizes) == len(gpus) == pool.gpus_per_node * pool.nodes:
        changes["memory_gib_per_gpu"] = _floor(min(sizes) / GIB)
        changes["links"] = _links(pool, nodes)
    return pool.model_copy(update=changes)


def _links(pool: Pool, nodes: Sequence[NodeFacts]) -> Links:
    links = pool.links
    pairs = [pair for node in nodes for pair in node.pairs]
    if pairs:
        weakest = max((link_of(pair) for pair in pairs), key=_WEAKNESS.index)
        links = links.model_copy(update={"intra": weakest})
    speeds = [sum(nic.gbps or 0 for nic in node.nics) for node in nodes]
    if links.inter_gbps is None and all(speeds):
        links = links.model_copy(update={"inter_gbps": min(speeds)})
    return links


_WEAKNESS = ("nvlink", "pcie", "pcie-no-p2p")


def link_of(pair: PairFacts) -> str:
    """The `links.intra` that this pair of GPUs bears out."""
    if pair.copy_correct is False or (pair.peer and pair.peer != "OK"):
        return "pcie-no-p2p"
    return "nvlink" if pair.path.startswith("NV") else "pcie"


def pools_of(node: NodeFacts, catalogue: Catalogue, name: str) -> tuple[Pool, ...]:
    """The node's GPUs as pools of one node, one a GPU type; a mixed box has several."""
    kinds = device_kinds(node, catalogue)
    slices = {each.uuid: each for gpu in node.gpus for each in gpu.mig_slices}
    return tuple(
        Pool(
            name=name if len(kinds) == 1 else f"{name}-{kind.lower()}",
            gpu=kind,
            gpus_per_node=len(uuids),
            memory_gib_per_gpu=_slice_gib([slices[each].memory_bytes for each in uuids])
            if uuids[0] in slices
            else _torch_gib([gpu for gpu in node.gpus if gpu.uuid in uuids]),
            host_memory_gib=round(node.host_memory_bytes / GIB, 1),
            links=_own_links(node, uuids),
            node_names=(node.host if len(kinds) == 1 else f"{node.host}-{kind.lower()}",),
        )
        for kind, uuids in kinds.items()
    )


def _own_links(node: NodeFacts, uuids: Sequence[str]) -> Links:
    indices = {gpu.index for gpu in node.gpus if gpu.uuid in uuids}
    pairs = [pair for pair in node.pairs if {pair.first, pair.second} <= indices and pair.path]
    if not pairs:
        return Links()
    weakest = max((link_of(pair) for pair in pairs), key=_WEAKNESS.index)
    return Links.model_validate({"intra": weakest})


def _torch_gib(gpus: Sequence[GpuFacts]) -> float | None:
    sizes = [gpu.torch_memory_bytes for gpu in gpus if gpu.torch_memory_bytes]
    return _floor(min(sizes) / GIB) if sizes and len(sizes) == len(gpus) else None


def _slice_gib(sizes: Sequence[int]) -> float:
    return _floor(min(sizes) / GIB)


def _floor(gib: float) -> float:
    return round(int(gib / _STEP_GIB) * _STEP_GIB, 1)


def mixed(node: NodeFacts, catalogue: Catalogue) -> str:
    """`4 x H100-SXM, 2 x RTX-4090` of a mixed box; empty where all devices are alike."""
    counts = Counter({kind: len(uuids) for kind, uuids in device_kinds(node, catalogue).items()})
    if len(counts) < 2:
        return ""
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())
