"""Gangs are on the nodes of the plan, in the order of its ranks, while these nodes are to be had."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from cluster.gang_nodes import (
    Move,
    NodeWish,
    next_move,
    planned_wishes,
    rank_order,
    reserved,
    shared_out,
    with_planned,
)
from cluster.generations import Census, Deployed, ServedReplica, key_of, selectors, together
from cluster.names import NODE_LABEL, POOL_LABEL
from cluster.placement_check import NodeFacts
from placement.fleet import ReplicaBounds
from placement.plan import NodeGpus, StageNodes, Variant
from tests.builders import a_shape, a_variant
from tests.cluster.test_lifecycle import Fleet

IDS = {name: f"id-{name}" for name in "abcd"}
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


ANYWHERE = NodeWish()
AB, CD = NodeWish(("id-a", "id-b")), NodeWish(("id-c", "id-d"))


def test_each_planned_replica_of_a_gang_has_a_place_on_its_nodes_by_rank():
    assert planned_wishes(a_gang("ba", "cd"), IDS) == (ANYWHERE, NodeWish(("id-b", "id-a")), CD)
    assert selectors(a_gang("ba"), ("id-b", "id-a")) == [
        {POOL_LABEL: "local", NODE_LABEL: "id-b"},
        {POOL_LABEL: "local", NODE_LABEL: "id-a"},
    ]


def test_a_replica_that_is_planned_on_a_node_that_is_not_there_may_be_anywhere():
    assert planned_wishes(a_gang("ax", "cd"), IDS) == (ANYWHERE, ANYWHERE, CD)
    assert planned_wishes(a_gang("ax", "xy"), IDS) == (ANYWHERE,)
    assert planned_wishes(a_variant(), IDS) == (ANYWHERE,)


def test_gangs_without_planned_nodes_may_be_on_any_of_their_pools_that_others_leave():
    variant = a_gang("ab")

    assert selectors(variant) == [{POOL_LABEL: "local"}] * 2
    leaving = selectors(variant, leaves=("id-c", "id-d"))
    assert leaving == [{POOL_LABEL: "local", NODE_LABEL: "!in(id-c,id-d)"}] * 2


def test_gangs_leave_whole_sets_of_others_alone_where_these_need_all_gpus():
    variant, wishes = a_gang("ab", "cd"), (ANYWHERE, AB, CD)

    assert reserved(variant, wishes, 0, NODES) == ("id-a", "id-b", "id-c", "id-d")
    assert reserved(variant, (ANYWHERE, ANYWHERE, CD), 1, NODES) == ("id-c", "id-d")
    without_d = {name: node for name, node in NODES.items() if name != "id-d"}
    assert reserved(variant, wishes, 1, without_d) == ()
    larger = {name: replace(node, total={"bora_slot": 2.0}) for name, node in NODES.items()}
    assert reserved(variant, wishes, 0, larger) == ()


def test_a_later_plan_adds_nodes_and_moves_no_gang_that_is_there():
    ca, bd = NodeWish(("id-c", "id-a")), NodeWish(("id-b", "id-d"))

    assert with_planned((ANYWHERE, AB), (ANYWHERE, AB, CD), {1}) == (ANYWHERE, AB, CD)
    assert with_planned((ANYWHERE, AB, CD), (ANYWHERE, ca, bd), {1}) == (ANYWHERE, AB, ca, bd)
    assert with_planned((ANYWHERE, AB, CD), (ANYWHERE, CD, AB), {1, 2}) == (ANYWHERE, AB, CD)
    assert with_planned((ANYWHERE,), (ANYWHERE, AB), {0}) == (ANYWHERE, AB)


def parts(**states: str) -> dict[int, Deployed]:
    """By place (`p1`): the states of its replicas, a letter each; `P` has no nodes yet."""
    names = {"R": "RUNNING", "S": "STARTING", "P": "STARTING", "G": "STOPPING"}
    return {
        int(place[1:]): Deployed(
            config={"model": "chat"},
            target=len(letters.replace("G", "")),
            replicas=tuple(
                ServedReplica(f"{place}-{letter}{number}", names[letter], started_s=99.0)
                for number, letter in enumerate(letters)
            ),
        )
        for place, letters in states.items()
    }


@pytest.mark.parametrize(
    ("count", "served", "alive", "expected"),
    [
        (0, {}, "abcd", {1: 0}),
        (1, {}, "abcd", {1: 1}),
        (3, {}, "abcd", {1: 1, 2: 1, 0: 1}),
        (1, {}, "acd", {2: 1}),  # b is gone
        (2, {}, "acd", {1: 1, 2: 1}),  # it waits there, until it is let go
        (1, {"p1": "S", "p2": "R"}, "abcd", {1: 0, 2: 1}),  # who starts goes first
        (2, {"p1": "R", "p2": "S", "p0": "R"}, "abcd", {1: 1, 2: 0, 0: 1}),
        (3, {"p1": "R", "p0": "R"}, "abcd", {1: 1, 2: 1, 0: 1}),
        (1, {"p2": "S"}, "abcd", {2: 1}),
        (0, {"p1": "R", "p2": "R"}, "abcd", {1: 0, 2: 0}),
    ],
)
def test_gangs_are_shared_out_over_the_sets_of_the_plan(
    count: int, served: dict[str, str], alive: str, expected: dict[int, int]
):
    nodes = {f"id-{name}" for name in alive}

    assert shared_out(count, (ANYWHERE, AB, CD), parts(**served), nodes) == expected


def test_what_serve_runs_of_a_gang_in_several_places_counts_as_one_generation():
    each = parts(p1="R", p2="S")

    whole = together({**each, 0: replace(each[1], deleting=True, gave_up=True)})

    assert (whole.target, whole.count("RUNNING"), whole.count("STARTING")) == (2, 2, 1)
    assert not whole.deleting
    assert not whole.gave_up
    assert list(whole.living) == [1, 2]
    assert together({0: replace(each[1], deleting=True)}).deleting


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


def a_census(variant: Variant, served: dict[str, str], **changes: Any) -> Census:
    """Replicas called `P` have no place, and neither have those called `G`, which are to go."""
    each = parts(**served)
    replicas = [replica.replica for part in each.values() for replica in part.replicas]
    placeless = {name for name in replicas if "-P" in name or "-G" in name}
    fields: dict[str, Any] = {"placeless": frozenset(placeless), "nodes": NODES}
    return Census(
        begun_s=0.0, generations={key_of(variant): together(each)}, **{**fields, **changes}
    )


def in_use(*names: str) -> dict[str, NodeFacts]:
    return {
        id_: replace(node, free={}) if node.name in names else node for id_, node in NODES.items()
    }


def without(name: str) -> dict[str, NodeFacts]:
    return {id_: node for id_, node in NODES.items() if node.name != name}


@pytest.mark.parametrize(
    ("served", "nodes", "asked", "move"),
    [
        ({"p1": "P"}, NODES, {}, None),
        ({"p1": "R"}, without("b"), {}, None),  # its place is its own
        ({"p1": "S"}, without("b"), {}, None),
        ({"p1": "G"}, without("b"), {}, None),  # nobody wants it any more
        ({"p1": "P"}, without("b"), {}, Move(1, 2, "node id-b is gone")),
        ({"p1": "P", "p2": "R"}, without("b"), {}, Move(1, None, "node id-b is gone")),
        ({"p1": "R", "p2": "P"}, without("c"), {}, Move(2, None, "node id-c is gone")),
        ({"p1": "P"}, without("b"), {"drained": {"id-d"}}, Move(1, None, "node id-b is gone")),
        ({"p1": "P"}, NODES, {"drained": {"id-b"}}, Move(1, 2, "b is drained")),
        ({"p1": "P"}, in_use("a", "b"), {"now_s": 160.0}, Move(1, 2, "a and b are in use")),
        ({"p1": "P"}, in_use("a", "d"), {"now_s": 160.0}, Move(1, None, "a and b are in use")),
        ({"p0": "P", "p1": "R", "p2": "R"}, NODES, {"now_s": 160.0}, None),
    ],
)
def test_a_gang_that_cannot_have_its_nodes_takes_a_free_set_of_the_plan_or_any_nodes(
    served: dict[str, str],
    nodes: dict[str, NodeFacts],
    asked: dict[str, Any],
    move: Move | None,
):
    variant = a_gang("ab", "cd")
    now = a_census(variant, served, nodes=nodes)
    known: dict[str, Any] = {"drained": (), "now_s": 100.0, **asked}

    assert next_move(variant, (ANYWHERE, AB, CD), now, **known) == move


def test_a_gang_waits_for_nodes_that_an_older_shape_of_its_model_leaves():
    variant = a_gang("ab")
    now = a_census(variant, {"p1": "P"}, nodes=in_use("a"))
    old = {key_of(a_gang("cd", commit="old")): parts(p1="R")[1]}
    both = replace(now, generations={**old, **now.generations})

    assert next_move(variant, (ANYWHERE, AB), both, drained=(), now_s=160.0) is None
    assert next_move(variant, (ANYWHERE, AB), now, drained=(), now_s=160.0) is not None


async def test_a_gang_whose_node_is_gone_gets_another_one_and_that_is_told():
    fleet = Fleet(0, variant=a_gang("ab"))
    fleet.deployer.wished = (ANYWHERE, AB)
    replica = ServedReplica("r0", "STARTING", started_s=time.time())
    part = Deployed(fleet.variant.model_dump(mode="json"), target=1, replicas=(replica,))
    fleet.served[key_of(fleet.variant)] = together({1: part})
    fleet.placeless = frozenset({"r0"})
    fleet.nodes = {"id-a": NODES["id-a"]}

    await fleet.lifecycle.look(act=True)
    await fleet.lifecycle.look(act=True)

    why = "node id-b is gone"
    assert fleet.deployer.calls == [("move", key_of(fleet.variant), Move(1, None, why))]
    told = [text for kind, text in fleet.notes if "of which" in text]
    assert told == [f"not on the nodes of the plan, of which {why}: any of pool local will do"]


def test_that_a_gang_goes_to_another_set_or_leaves_those_of_others_is_told():
    variant, wishes = a_gang("ab", "cd"), (ANYWHERE, AB, CD)

    assert Move(1, 2, "node id-b is gone").told(variant, wishes, NODES) == (
        "not on the nodes of the plan, of which node id-b is gone: c and d are planned too, and free"
    )
    assert (
        Move(1, None, "b is drained")
        .told(variant, wishes, NODES)
        .endswith("any of pool local will do, but those that other replicas are planned on")
    )
