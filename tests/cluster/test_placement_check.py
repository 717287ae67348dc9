"""Planned against actual places, and why a replica has none."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.messages import RankPlace
from cluster.placement_check import NodeFacts, differences, explain_waiting, shared_gpus
from placement.plan import NodeGpus, Variant
from tests.builders import a_report, a_shape, a_variant


def a_node(name: str = "a", **changes: Any) -> NodeFacts:
    fields: dict[str, Any] = {
        "node_id": f"id-{name}",
        "name": name,
        "pool": "h100",
        "total": {"GPU": 8.0},
        "free": {"GPU": 0.0},
    }
    return NodeFacts(**{**fields, **changes})


def a_placed_variant(**changes: Any) -> Variant:
    placement = ((NodeGpus(node="a", gpus=(0, 1)),), (NodeGpus(node="b", gpus=(0, 1)),))
    fields = {"pool": "h100", "gpus_per_replica": 2, "placement": placement}
    return a_variant(**{**fields, **changes})


NODES = {node.node_id: node for node in (a_node("a"), a_node("b"), a_node("c"))}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([], "no node of that pool is alive"),
        ([a_node(pool="other")], "no node of that pool is alive"),
        ([a_node(draining=True)], "all of its nodes are draining"),
        ([a_node(total={"GPU": 1.0})], "no node has more than 1"),
        ([a_node("b"), a_node("a", free={"GPU": 1.0})], "a has 1 of 8 free, b has 0 of 8 free"),
    ],
)
def test_a_replica_without_a_place_says_what_is_missing_where(nodes: list[NodeFacts], said: str):
    text = explain_waiting(a_placed_variant(), {"GPU": 2.0}, nodes)

    assert "2 GPU on one node of pool h100" in text
    assert said in text


def test_places_as_planned_are_no_news():
    reports = [
        a_report(replica="r1", node_id="id-a", gpus=(0, 1), num_devices=2),
        a_report(replica="r2", node_id="id-b", gpus=(0, 1), num_devices=2),
    ]

    assert differences(a_placed_variant(), reports, NODES, shared_gpus(reports)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_devices": 1}, "holds 1 GPUs, planned were 2"),
        ({"weights_bytes": 94 * 10**9}, "weights take 87.54 GiB a GPU, planned were 43.77"),
        ({"gpus": (2, 3)}, "r1 runs on GPU 2, 3 of a, not 0, 1"),
        ({"node_id": "id-c", "node": "c"}, "planned on a (1), b (1), runs on c (1) instead"),
    ],
)
def test_what_is_not_as_planned_is_said(change: dict[str, Any], said: str):
    fields = {"replica": "r1", "node_id": "id-a", "gpus": (0, 1), "num_devices": 2}

    [text] = differences(a_placed_variant(), [a_report(**{**fields, **change})], NODES)

    assert said in text


def test_a_planned_node_that_is_gone_is_said():
    reports = [a_report(replica=each, node_id="id-a", num_devices=2) for each in ("r1", "r2")]
    left = {node.node_id: node for node in (a_node("a"), a_node("c"))}

    [text] = differences(a_placed_variant(), reports, left)

    assert text == "planned on b (1), runs on a (1) instead (b is gone)"


def test_a_host_under_a_new_ray_id_has_the_part_of_its_old_one():
    placement = tuple((NodeGpus(node=f"{host}-0000", gpus=(0, 1)),) for host in "ab")
    nodes = {node.node_id: node for node in (a_node("a-0000"), a_node("b-1111"))}
    reports = [
        a_report(replica="r1", node_id="id-a-0000", gpus=(0, 1), num_devices=2),
        a_report(replica="r2", node_id="id-b-1111", gpus=(2, 3), num_devices=2),
    ]

    [text] = differences(a_placed_variant(placement=placement), reports, nodes)

    assert text == "r2 runs on GPU 2, 3 of b-1111, not 0, 1"


def test_a_replica_in_another_pool_is_named():
    nodes = {"id-a": a_node("a", pool="a100")}

    [text] = differences(a_placed_variant(), [a_report(node_id="id-a", num_devices=2)], nodes)

    assert "pool a100, planned was pool h100" in text


def test_two_replicas_on_one_gpu_are_named_once():
    one = a_report(replica="r1", node="a", node_id="id-a", gpus=(0, 1), num_devices=2)
    two = a_report(replica="r2", node="a", node_id="id-a", gpus=(1, 2), num_devices=2)
    variant = a_placed_variant(placement=())

    found = differences(variant, [one, two], NODES, shared_gpus([two, one]))

    assert found == ["r1 and r2 both hold GPU 1 of a"]


def test_more_replicas_than_were_planned_may_be_anywhere():
    reports = [
        a_report(replica=f"r{number}", node_id=node, num_devices=2)
        for number, node in enumerate(("id-a", "id-b", "id-c"))
    ]

    assert differences(a_placed_variant(), reports, NODES) == []


def a_gang(**changes: Any) -> Variant:
    placement = ((NodeGpus(node="a", gpus=(0, 1)), NodeGpus(node="b", gpus=(0, 1))),)
    fields = {"gpus_per_replica": 4, "placement": placement, "shape": a_shape(num_nodes=2)}
    return a_placed_variant(**{**fields, **changes})


def a_follower(**changes: Any) -> RankPlace:
    fields: dict[str, Any] = {"node": "b", "node_id": "id-b", "gpus": (0, 1), "num_devices": 2}
    return RankPlace(**{**fields, **changes})


def test_a_gang_on_its_planned_nodes_in_another_order_is_told():
    leader = {"replica": "r1", "gpus": (0, 1), "num_devices": 2}
    there = a_report(node_id="id-a", followers=(a_follower(),), **leader)
    swapped = a_report(node_id="id-b", followers=(a_follower(node_id="id-a"),), **leader)

    assert differences(a_gang(), [there], NODES, shared_gpus([there])) == []
    assert differences(a_gang(), [swapped], NODES, shared_gpus([swapped])) == [
        "r1: its ranks are on b, a, planned were a, b"
    ]


def test_a_gang_over_two_planned_sets_of_nodes_is_told():
    gpus = (0, 1)
    sets = tuple(tuple(NodeGpus(node=node, gpus=gpus) for node in names) for names in ("ab", "cd"))
    nodes = {f"id-{name}": a_node(name) for name in "abcd"}
    crossed = [
        a_report(
            replica=f"r{leader}",
            node_id=f"id-{leader}",
            num_devices=2,
            followers=(a_follower(node_id=f"id-{follower}"),),
        )
        for leader, follower in ("ad", "cb")
    ]

    assert differences(a_gang(placement=sets), crossed, nodes) == [
        "ra: its ranks are on a, d, planned were a, b or c, d",
        "rc: its ranks are on c, b, planned were a, b or c, d",
    ]


def test_which_planned_nodes_of_a_waiting_gang_are_lost_is_told():
    waits = explain_waiting(a_gang(), {"GPU": 2.0}, [a_node(draining=True)])

    assert waits.endswith("; of the planned nodes b is gone and a is drained")


def test_what_is_not_as_planned_about_a_follower_is_said():
    leader = a_report(replica="r1", node_id="id-a", gpus=(0, 1), num_devices=2)
    lost = leader.model_copy(update={"followers": (a_follower(node_id="id-c", num_devices=1),)})

    assert differences(a_gang(), [lost], NODES) == [
        "r1 holds 3 GPUs, planned were 4",
        "planned on b (1), runs on c (1) instead",
    ]


def test_a_gang_that_shares_a_gpu_by_a_follower_is_named():
    gang = a_report(replica="r1", node_id="id-a", num_devices=2, followers=(a_follower(),))
    other = a_report(replica="r2", node_id="id-b", gpus=(1,))

    found = differences(a_gang(placement=()), [gang], NODES, shared_gpus([gang, other]))

    assert found == ["r1 and r2 both hold GPU 1 of b"]


@pytest.mark.parametrize(
    ("names", "said"),
    [("a", "needs 2 GPU on each of 2 nodes of pool h100, which has 1 such"), ("ab", "a has 0 of")],
)
def test_a_gang_without_a_place_says_how_many_nodes_it_needs(names: str, said: str):
    assert said in explain_waiting(a_gang(), {"GPU": 2.0}, [a_node(name) for name in names])
