"""Two replicas on one node where the plan has two: one goes home, and nothing is ever missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.autoscaler import Autoscaler
from cluster.departures import Departures
from cluster.errors import ClusterError
from cluster.event_log import EventLog
from cluster.generations import Census, Deployed, ServedReplica, key_of
from cluster.messages import DrainRequest
from cluster.moves import AGAIN_S, PLACE_S, SETTLE_S, START_S, Moves
from cluster.placement_check import NodeFacts
from cluster.registry import Registry
from placement.plan import NodeGpus
from tests.builders import a_report, a_variant
from tests.cluster.recording_counts import RecordingCounts, RecordingRooms

PLACEMENT = ((NodeGpus(node="a-1", gpus=(0, 1)),), (NodeGpus(node="b-1", gpus=(0, 1)),))
VARIANT = a_variant(
    pool="h100", gpu="H100-SXM", gpus_per_replica=2, placement=PLACEMENT, replicas=2
)
KEY = key_of(VARIANT)


def a_node(name: str, free: float, **changes: Any) -> NodeFacts:
    fields: dict[str, Any] = {"pool": "h100", "total": {"GPU": 8.0}, "free": {"GPU": free}}
    return NodeFacts(node_id=f"id-{name}", name=name, **{**fields, **changes})


class Story:
    """r1 and r2 are both on node a, which has room for more; so has c, which is in the pool too."""

    def __init__(self, **nodes: NodeFacts) -> None:
        known = (a_node("a-1", 4), a_node("b-1", 8), a_node("c-1", 2))
        self.nodes = {node.node_id: node for node in (*known, *nodes.values())}
        self.replicas: dict[str, tuple[str, str]] = {}  # state and node's id
        self.now_s = 1000.0
        self.target = 2
        self.gave_up = False
        self.variants = [VARIANT]
        self.registry, self.autoscaler = Registry(timeout_s=1e9), Autoscaler()
        self.autoscaler.set(VARIANT, 2)
        self.serve, self.rooms = RecordingCounts(), RecordingRooms()
        self.events = EventLog(Path(os.devnull))
        self.departures = Departures(
            self.registry, self.autoscaler, self.serve, self.events,
            nodes=lambda: self.nodes, drain_node=lambda *_: None,
        )  # fmt: skip
        self.moves = Moves(
            self.registry, self.autoscaler, self.departures, self.serve, self.events,
            rooms=self.rooms, clock=lambda: self.now_s,
        )  # fmt: skip
        self.runs("r1", "id-a-1", gpus=(0, 1))
        self.runs("r2", "id-a-1", gpus=(2, 3))

    def runs(self, name: str, node: str, *, ready: bool = True, **changes: Any) -> None:
        self.replicas[name] = ("RUNNING" if ready else "STARTING", node)
        state = "ready" if ready else "starting"
        report = a_report(
            replica=name, variant=VARIANT.variant, version=KEY.version, node_id=node, state=state,
            **changes,
        )  # fmt: skip
        self.registry.report(report, self.now_s)

    def census(self) -> Census:
        replicas = tuple(
            ServedReplica(r, state, node) for r, (state, node) in self.replicas.items()
        )
        config = VARIANT.model_dump(mode="json")
        served = Deployed(config, self.target, replicas, gave_up=self.gave_up)
        return Census(self.now_s, {KEY: served}, frozenset(), self.nodes)

    async def later(self, seconds: float = 1.0) -> None:
        self.now_s += seconds
        await self.moves.step(self.variants, self.census())

    async def begun(self) -> None:
        """The extra replica is asked for."""
        await self.later()
        await self.later(SETTLE_S)
        self.target = 3
        self.replicas["r3"] = ("STARTING", "")

    @property
    def wanted(self) -> int:
        """What Serve is asked for from now on."""
        return self.departures.counts([VARIANT])[VARIANT.variant]

    def orders(self) -> list[str]:
        return [name for name in self.replicas if self.departures.order_for(name) is not None]

    def last(self) -> str:
        return list(self.events)[-1].text


async def test_one_more_is_asked_for_while_no_other_node_of_the_pool_has_room():
    story = Story()

    await story.begun()

    assert story.serve.calls == [("scale", KEY, 3)]
    assert story.rooms.held == {"id-a-1": {"GPU": 4.0}, "id-c-1": {"GPU": 2.0}}
    assert story.orders() == []
    assert story.last() == "move: one more replica, for r2 on a-1, planned on b-1"


async def test_the_rooms_are_given_back_as_soon_as_ray_has_placed_it():
    story = Story()
    await story.begun()

    story.runs("r3", "id-b-1", ready=False)
    await story.later()

    assert story.rooms.held == {}
    assert (story.wanted, story.orders()) == (3, [])


async def test_the_one_beside_the_plan_goes_when_the_one_at_home_serves():
    story = Story()
    await story.begun()

    story.runs("r3", "id-b-1", gpus=(0, 1))
    await story.later()

    assert story.orders() == ["r2"]  # r1 has the GPUs of the plan
    assert story.wanted == 3  # until r2 has gone
    assert story.last() == "move: done: r3 serves on b-1 (r2 on a-1, planned on b-1)"
    story.departures.forget_all_but({"r1", "r3"})
    assert story.wanted == 2


def at_work(story: Story) -> None:
    story.target = 3


ALL_WELL = [
    lambda story: story.nodes.update({"id-b-1": a_node("b-1", 1)}),  # no room
    lambda story: story.nodes.pop("id-b-1"),
    lambda story: story.runs("r2", "id-b-1"),  # as planned
    lambda story: story.runs("r2", "id-a-1", ready=False),
    lambda story: story.autoscaler.set(VARIANT, 3),
    lambda story: story.replicas.update(r9=("STOPPING", "id-a-1")),
    at_work,
]


@pytest.mark.parametrize("change", ALL_WELL)
async def test_nothing_is_moved_without_room_or_need_or_while_anything_else_goes_on(change: Any):
    story = Story()
    change(story)

    await story.begun()

    assert story.serve.calls == []
    assert story.rooms.held == {}


async def test_a_drained_node_takes_nothing_home():
    story = Story()
    await story.departures.drain(DrainRequest(target="b-1"))

    await story.begun()

    assert story.serve.calls == []


async def test_what_comes_and_goes_is_not_chased():
    story = Story()
    await story.later()
    story.runs("r2", "id-b-1")
    await story.later(SETTLE_S)
    story.runs("r2", "id-a-1")

    await story.later()

    assert story.serve.calls == []


GIVEN_UP: Sequence[tuple[Any, float, str]] = [
    (lambda story: story.runs("r3", "id-c-1", ready=False), 1, "placed the replica elsewhere"),
    (lambda story: None, PLACE_S + 1, "has not placed the replica for 16 s"),
    (lambda story: story.replicas.pop("r1"), 1, "a replica has ended meanwhile"),
    (lambda story: story.autoscaler.set(VARIANT, 1), 1, "another number of replicas is wanted"),
    (lambda story: story.nodes.pop("id-b-1"), 1, "b-1 is gone or drained"),
    (lambda story: story.variants.clear(), 1, "the plan has changed"),
    (lambda story: story.runs("r3", "id-b-1", ready=False), START_S + 1, "does not start there"),
]


@pytest.mark.parametrize(("change", "seconds", "why"), GIVEN_UP)
async def test_where_anything_comes_between_the_extra_one_is_taken_back(
    change: Any, seconds: float, why: str
):
    story = Story()
    await story.begun()

    change(story)
    await story.later(seconds)

    assert why in story.last()
    assert story.wanted == story.autoscaler.target(VARIANT)
    assert (story.orders(), story.rooms.held) == ([], {})


async def test_a_variant_is_moved_at_most_once_in_a_while():
    story = Story()
    await story.begun()
    await story.later(PLACE_S + 1)  # given up
    story.target = 2
    del story.replicas["r3"]

    await story.later()
    await story.later(SETTLE_S + 1)
    assert len(story.serve.calls) == 1

    await story.later(AGAIN_S)
    assert len(story.serve.calls) == 2


async def test_rooms_that_somebody_else_takes_first_begin_nothing():
    story = Story()
    story.rooms.refuses = True
    await story.later()

    with pytest.raises(ClusterError):
        await story.later(SETTLE_S)

    assert story.serve.calls == []
    assert story.wanted == 2


async def test_the_host_of_the_planned_node_counts_under_its_new_id():
    story = Story()
    del story.nodes["id-b-1"]
    back = a_node("b-2", 8)
    story.nodes[back.node_id] = back

    await story.begun()
    story.runs("r3", back.node_id)
    await story.later()

    assert story.orders() == ["r2"]


async def test_replicas_that_no_plan_places_may_be_anywhere():
    story = Story()
    story.nodes = {
        node_id: replace(node, name=f"x{node.name}") for node_id, node in story.nodes.items()
    }

    await story.begun()

    assert story.serve.calls == []
