"""Where an inventory and what probes found differ: by host, with what was declared and the cure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from placement import gpu_mismatches, host_mismatches
from placement.catalogue import Catalogue
from placement.inventory import Inventory, Pool
from placement.mismatch import Expected, Mismatch
from placement.node_facts import NodeFacts


def mismatches(
    declared: Inventory,
    found: Sequence[NodeFacts],
    *,
    catalogue: Catalogue,
    checkpoints: Mapping[str, Mapping[str, int]] | None = None,
) -> tuple[Mismatch, ...]:
    """Every lie of `declared`, in the order of its pools and nodes.

    `checkpoints`: by pool, the weights that its nodes must hold: bytes by Hugging Face repo id.
    A node of `found` belongs to the pool that lists its name or host, else to that of its label.
    """
    answer: list[Mismatch] = []
    for pool in declared.pools:
        nodes = _nodes_of(pool, declared, found)
        expected = Expected.of(pool, catalogue, (checkpoints or {}).get(pool.name, {}))
        answer += [*_missing(pool, nodes), *_undeclared(pool, nodes)]
        for node in nodes:
            answer += gpu_mismatches.of_node(expected, node, catalogue)
            answer += host_mismatches.of_node(expected, node)
    return (*answer, *_counted_twice(found), *host_mismatches.differing_versions(found))


def _counted_twice(found: Sequence[NodeFacts]) -> Iterator[Mismatch]:
    """GPUs that two Ray nodes of a host both offer; each may offer other slices of one GPU."""
    holders: dict[tuple[str, str], NodeFacts] = {}
    for node in found:
        own = {(node.host, gpu.uuid): node for gpu in node.gpus if gpu.uuid and not gpu.mig}
        twice = [key for key in own if key in holders]
        if twice:
            yield Mismatch(
                rule="gpu-counted-twice",
                host=node.host,
                pool=node.pool,
                declared=f"{len(node.gpus)} GPUs of Ray node {node.node}",
                found=f"{len(twice)} of them belong to {holders[twice[0]].node} too",
                cure="start one Ray node for all GPUs of a kind: `bora probe --ray-start` prints "
                "the commands",
            )
        holders |= own


def _nodes_of(pool: Pool, declared: Inventory, found: Sequence[NodeFacts]) -> list[NodeFacts]:
    named = {name for each in declared.pools for name in each.node_names or ()}
    own = set(pool.node_names or ())
    return [
        node
        for node in found
        if own & {node.node, node.host}
        or (node.pool == pool.name and not named & {node.node, node.host})
    ]


def _undeclared(pool: Pool, nodes: Sequence[NodeFacts]) -> Iterator[Mismatch]:
    """Nodes that carry the pool's label, so that Ray places its replicas there, and no plan knows."""
    extra = nodes[pool.nodes :]
    if pool.node_names is not None:
        extra = [node for node in nodes if not {node.node, node.host} & set(pool.node_names)]
    for node in extra:
        yield Mismatch(
            rule="node-undeclared",
            pool=pool.name,
            host=node.host,
            declared=f"{pool.nodes} nodes in pool {pool.name}",
            found=f"{node.node} carries its label too",
            cure="add it to the pool, or restart its Ray node with another `--labels bora.pool=`",
            severity="warning",
        )


def _missing(pool: Pool, nodes: Sequence[NodeFacts]) -> Iterator[Mismatch]:
    present = {name for node in nodes for name in (node.node, node.host)}
    absent = [name for name in pool.node_names or () if name not in present]
    count = pool.nodes - len(nodes)
    if pool.node_names is None and count > 0:
        absent = [f"{count} of {pool.nodes} nodes"]
    for name in absent:
        yield Mismatch(
            rule="node-missing",
            pool=pool.name,
            host=name,
            declared=f"in pool {pool.name}",
            found="not in the cluster",
            cure="start it (`ray start`, or `ray up`), or take it out of the inventory",
            # A pool that only gives a number may be one whose hosts start when replicas need them.
            severity="warning" if pool.node_names is None else "error",
        )
