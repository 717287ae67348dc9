"""Labels of Ray nodes, there and back."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.names import GPU_LABEL, MEMORY_LABEL, POOL_LABEL, SLOT
from cluster.ray_inventory import node_labels, ray_inventory
from cluster.ray_survey import told_apart
from placement.errors import ConfigError
from placement.inventory import Pool
from tests.placement.nodes import a_node as facts_of


def a_node(name: str = "a", **changes: Any) -> dict[str, Any]:
    fields = {
        "NodeID": f"{name:0>8}ffff",
        "NodeManagerHostname": name,
        "Alive": True,
        "Labels": {POOL_LABEL: "h100", GPU_LABEL: "H100-SXM"},
        "Resources": {"GPU": 8.0, "CPU": 64.0},
    }
    return {**fields, **changes}


def a_labelled(memory: str) -> dict[str, Any]:
    return a_node("m", Labels={POOL_LABEL: "h100", GPU_LABEL: "H100-SXM", MEMORY_LABEL: memory})


def test_nodes_with_the_same_label_are_a_pool():
    [pool] = ray_inventory([a_node("a"), a_node("b")]).pools

    assert (pool.name, pool.gpu, pool.nodes, pool.gpus_per_node) == ("h100", "H100-SXM", 2, 8)


def test_dead_and_unlabelled_nodes_are_left_out():
    nodes = [a_node("a"), a_node("b", Alive=False), a_node("c", Labels={})]

    [pool] = ray_inventory(nodes).pools

    assert pool.nodes == 1


def test_a_cpu_pool_keeps_its_memory_over_the_labels():
    pool = Pool(
        name="local", gpu="cpu", gpus_per_node=4, memory_gib_per_gpu=5.25, kv_cache_gib_per_gpu=1.0
    )

    [again] = ray_inventory([a_node(Labels=node_labels(pool), Resources={SLOT: 4.0})]).pools

    assert again.memory_gib_per_gpu == 5.25
    assert again.kv_cache_gib_per_gpu == 1.0
    assert again.gpus_per_node == 4


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([a_node(Labels={})], POOL_LABEL),
        (
            [a_node("a"), a_node("b", Resources={"GPU": 4.0})],
            "differ: a-0000000a: 8 x H100-SXM; b-0000000b: 4 x H100-SXM",
        ),
        ([a_node("a"), a_node("b", Labels={POOL_LABEL: "h100"})], r"b-0000000b: 8 x \(no bora"),
        ([a_node("a"), a_labelled("39.5")], "differ"),
        ([a_labelled("80GiB")], r"m-0000000m: its label bora.memory-gib is '80GiB'"),
        ([a_labelled("-1")], "'-1'"),
        ([a_labelled("nan")], "'nan'"),
        ([a_node(Labels={POOL_LABEL: "-x", GPU_LABEL: "H100"})], "a-0000000a make no pool '-x'"),
        ([a_node(Labels={POOL_LABEL: "x", GPU_LABEL: "cpu"})], "a-0000000a.*needs memory_gib"),
        ([a_node(Resources={"CPU": 1.0})], "no GPU"),
        ([a_node(Labels={POOL_LABEL: "x"})], GPU_LABEL),
    ],
)
def test_what_cannot_be_a_pool_is_refused_with_the_reason(nodes: list[Any], message: str):
    with pytest.raises(ConfigError, match=message):
        ray_inventory(nodes)


def test_hosts_that_are_called_alike_are_told_apart_by_their_address():
    nodes = [a_node("a", NodeManagerAddress=address) for address in ("10.0.0.1", "10.0.0.2")]
    facts = facts_of("a", address="10.0.0.2")

    assert told_apart(facts, nodes).host == "a (10.0.0.2)"
    assert told_apart(facts, nodes[1:] * 2).host == "a"  # two Ray nodes of one host
