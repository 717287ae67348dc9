"""Gangs are on the nodes of the plan, in the order of its ranks, while these nodes are to be had."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster.gang_nodes import planned_pins, rank_order, why_elsewhere
from cluster.generations import Deployed, ServedReplica, key_of, selectors
from cluster.names import NODE_LABEL, POOL_LABEL
from cluster.placement_check import NodeFacts
from placement.fleet import ReplicaBounds
from placement.plan import NodeGpus, StageNodes, Variant
from tests.builders import a_shape, a_variant
from tests.cluster.test_lifecycle import Fleet

IDS = {"a": "id-a", "b": "id-b", "c": "id-c"}
NODES = {
    node_id: NodeFacts(node_id, name, "local", {"bora_slot": 1.0}, {"bora_slot": 1.0})
    for name, node_id in IDS.items()
}


def a_gang(*replicas: str, **changes: Any) -> Variant:
    """Each of `replicas` names its nodes by rank, a letter each."""
    placement = tuple(
        tuple(NodeGpus(node=node, gpus=(0,)) for node in nodes) for nodes in replicas or ("ab",)
    )
    fields: dict[str, Any] = {
        "placement": placement,
        "gpus_per_replica": len(placement[0]),
        "shape": a_shape(num_nodes=len(placement[0])),
        "bounds": ReplicaBounds(min=1, max=1),
    }
    return a_variant(**{**fields, **changes})


def test_the_only_replica_of_a_gang_is_pinned_to_its_planned_nodes():
    assert planned_pins(a_gang("ba"), IDS) == ("id-b", "id-a")
    assert selectors(a_gang("ba"), ("id-b", "id-a")) == [
        {POOL_LABEL: "local", NODE_LABEL: "id-b"},
        {POOL_LABEL: "local", NODE_LABEL: "id-a"},
    ]


@pytest.mark.parametrize(
    "variant",
    [
        a_gang("ax"),  # planned on a node that is not there
        a_gang("ab", "ca"),
        a_gang("ab", bounds=ReplicaBounds(min=1, max=2)),
        a_variant(),
    ],
)
def test_others_may_be_on_any_node_of_their_pools(variant: Variant):
    assert planned_pins(variant, IDS) == ()
    assert selectors(variant) == [{POOL_LABEL: "local"}] * variant.shape.num_nodes


@pytest.mark.parametrize(
    ("planned", "bundles", "order"),
    [
        (("abcd",), "abcd", (0, 1, 2, 3)),
        (("abcd",), "adbc", (0, 2, 3, 1)),
        (("abcd",), "cdab", (0, 3, 2, 1)),  # the leader cannot move: b keeps rank 1
        (("abcd",), "axcb", (0, 3, 2, 1)),  # x stands in for d
        (("abcd", "efgh"), "ehgf", (0, 3, 2, 1)),
        (("xyzw",), "abcd", (0, 1, 2, 3)),  # planned elsewhere
        (("aabb",), "abba", (0, 3, 1, 2)),  # a node may have several bundles
    ],
)
def test_ranks_take_the_bundles_on_their_planned_nodes(
    planned: tuple[str, ...], bundles: str, order: tuple[int, ...]
):
    assert rank_order(a_gang(*planned), list(bundles)) == order


def test_ranks_stay_in_the_pools_of_their_stages():
    far = StageNodes(pool="far", gpu="RTX-4090", gpus=2)
    variant = a_gang("abcd", beside=(far,))

    assert variant.rank_pools == ("local", "local", "far", "far")
    assert rank_order(variant, list("abdc")) == (0, 1, 3, 2)
    assert rank_order(variant, list("axcb")) == (0, 1, 2, 3)  # b is now one of the far pool


def waiting(*, state: str = "STARTING", age_s: float = 1.0) -> Deployed:
    replica = ServedReplica("r0", state, started_s=100.0 - age_s)
    return Deployed(config={}, target=1, replicas=(replica,))


@pytest.mark.parametrize(
    ("served", "changes", "why"),
    [
        (waiting(), {}, ""),
        (waiting(), {"nodes": {"id-a": NODES["id-a"]}}, "node id-b is gone"),
        (waiting(), {"drained": {"id-b"}}, "b is drained"),
        (waiting(age_s=60.0), {}, "a and b are in use"),
        (waiting(age_s=60.0), {"patient": True}, ""),  # an older shape leaves them
        (waiting(age_s=60.0, state="RUNNING"), {"nodes": {}}, ""),  # its place is its own
        (waiting(age_s=60.0), {"placeless": ()}, ""),
    ],
)
def test_pinned_nodes_are_let_go_only_when_they_cannot_be_had_and_nothing_runs(
    served: Deployed, changes: dict[str, Any], why: str
):
    fields: dict[str, Any] = {
        "placeless": {"r0"}, "nodes": NODES, "drained": (), "now_s": 100.0, "patient": False,
    }  # fmt: skip
    asked = {**fields, **changes}
    placeless, nodes = asked.pop("placeless"), asked.pop("nodes")

    assert why_elsewhere(("id-a", "id-b"), served, placeless, nodes, **asked) == why


async def test_a_gang_whose_node_is_gone_gets_another_one_and_that_is_told():
    fleet = Fleet(0, variant=a_gang("ab"))
    fleet.deployer.pinned = ("id-a", "id-b")
    replica = ServedReplica("r0", "STARTING", started_s=time.time())
    fleet.serve(fleet.variant, "r0", replicas=(replica,))
    fleet.placeless = frozenset({"r0"})
    fleet.nodes = {"id-a": NODES["id-a"]}

    await fleet.lifecycle.look(act=True)
    await fleet.lifecycle.look(act=True)

    assert fleet.deployer.calls == [("unpin", key_of(fleet.variant), 1)]
    told = [text for kind, text in fleet.notes if "of which" in text]
    assert told == [
        "not on the nodes of the plan, of which node id-b is gone: any of pool local will do"
    ]
