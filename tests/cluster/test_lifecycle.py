"""Who goes when fewer are wanted, when a roll-out runs, and when a process is gone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.autoscaler import Autoscaler
from cluster.errors import ClusterError, WeightsMissing
from cluster.event_log import EventLog
from cluster.generations import Census, Deployed, GenerationKey, ServedReplica, key_of, plan_of
from cluster.lifecycle import Lifecycle
from cluster.messages import DrainRequest, RankPlace
from cluster.placement_check import NodeFacts
from cluster.registry import Registry
from placement.errors import UnknownName
from placement.plan import Variant
from tests.builders import a_report, a_shape, a_variant
from tests.cluster.recording_counts import RecordingCounts, RecordingRooms

NODE = NodeFacts("id-a", "a", "local", {"bora_slot": 4.0}, {"bora_slot": 0.0})


class Fleet:
    """One variant with replicas r0, r1, ... that Serve runs and that report."""

    def __init__(self, *running: int, variant: Variant | None = None) -> None:
        self.variant = variant or a_variant(replicas=len(running))
        self.beside: tuple[Variant, ...] = ()  # other variants of the plan
        self.registry, self.autoscaler = Registry(), Autoscaler()
        self.deployer = RecordingCounts()
        self.events = EventLog(Path(os.devnull))
        self.drained: list[tuple[Any, ...]] = []
        self.fetched: list[tuple[str, str]] = []
        self.may_come = asyncio.Event()
        self.refusal = self.no_drain = ""
        self.served: dict[GenerationKey, Deployed] = {}
        self.placeless: frozenset[str] = frozenset()
        self.nodes = {"id-a": NODE}
        self.later_s = 0.0  # that it is at the next census
        self.lifecycle = Lifecycle(
            self.registry,
            self.autoscaler,
            self.deployer,
            variants=lambda: (self.variant, *self.beside),
            events=self.events,
            take=self.census,
            drain_node=self.drain_node,
            fetch=self.fetch,
            rooms=RecordingRooms(),
        )
        for number, requests in enumerate(running):
            report = a_report(
                replica=f"r{number}", running=requests, version=key_of(self.variant).version
            )
            self.registry.report(report, time.monotonic() - 5)
        self.serve(self.variant, *(f"r{number}" for number in range(len(running))))

    async def fetch(self, variant: Variant, node_id: str, tell: Callable[[str], None]) -> None:
        self.fetched.append((variant.commit, node_id))
        tell("downloading weights, 50 % of 48.0 GiB")
        await self.may_come.wait()
        if self.refusal:
            raise WeightsMissing(self.refusal)

    def drain_node(self, *request: Any) -> None:
        if self.no_drain:
            raise ClusterError(self.no_drain)
        self.drained.append(request)

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Kinds and texts of what was told."""
        return [(event.kind, event.text) for event in self.events]

    def serve(self, variant: Variant, *replicas: str, **changes: Any) -> None:
        """What Serve runs of it from now on."""
        fields = {"config": variant.model_dump(mode="json"), "target": len(replicas)}
        served = tuple(ServedReplica(name, "RUNNING", "id-a") for name in replicas)
        self.served[key_of(variant)] = Deployed(**{**fields, "replicas": served, **changes})

    def census(self) -> Census:
        return Census(
            time.monotonic() + self.later_s, dict(self.served), self.placeless, self.nodes
        )


async def test_the_idlest_replica_goes_and_serves_count_follows_when_it_is_gone():
    fleet = Fleet(3, 0, 5)
    key = key_of(fleet.variant)

    await fleet.lifecycle.departures.scale(fleet.variant, 2)

    assert [fleet.lifecycle.departures.order_for(name) is None for name in ("r0", "r1", "r2")] == [
        True,
        False,
        True,
    ]
    assert fleet.deployer.calls == [("scale", key, 3)]
    fleet.serve(fleet.variant, "r0", "r2", target=3)
    await fleet.lifecycle.look(act=True)
    assert fleet.deployer.calls[1:] == [("scale", key, 2)]


async def test_those_that_still_start_go_before_any_that_serves():
    fleet = Fleet(0, 0)
    fleet.autoscaler.set(fleet.variant, 4)

    await fleet.lifecycle.departures.scale(fleet.variant, 2)

    assert fleet.deployer.calls == [("scale", key_of(fleet.variant), 2)]
    assert fleet.registry.ready(fleet.variant) == 2


async def test_a_drained_replica_is_replaced():
    fleet = Fleet(1, 1)

    await fleet.lifecycle.departures.drain(DrainRequest(target="r0", timeout_s=30))
    fleet.serve(fleet.variant, "r1", "its-successor")
    await fleet.lifecycle.look(act=True)

    assert fleet.deployer.calls == []
    assert fleet.registry.ready(fleet.variant) == 1


def a_gang(fleet: Fleet, replica: str, **changes: Any) -> None:
    """It reports, with its leader on node a and a follower on node b."""
    follower = RankPlace(node="b", node_id="id-b")
    version = key_of(fleet.variant).version
    fields = {"node_id": "id-a", "followers": (follower,), "version": version, **changes}
    fleet.registry.report(a_report(replica=replica, **fields), time.monotonic())


@pytest.mark.parametrize("node", ["id-a", "id-b"])
async def test_a_gang_goes_from_a_drained_node_whichever_of_its_ranks_is_there(node: str):
    fleet = Fleet(0)
    fleet.nodes = {f"id-{name}": replace(NODE, node_id=f"id-{name}", name=name) for name in "ab"}
    await fleet.lifecycle.look(act=True)
    a_gang(fleet, "r0")

    drained = await fleet.lifecycle.departures.drain(DrainRequest(target=node, timeout_s=30))

    assert drained.replicas == ("r0",)
    assert fleet.lifecycle.departures.order_for("r0") == 30


async def test_a_gang_that_was_just_coming_up_on_a_drained_node_is_told_to_go_when_it_is_known():
    fleet = Fleet(0)
    fleet.nodes = {f"id-{name}": replace(NODE, node_id=f"id-{name}", name=name) for name in "ab"}
    fleet.serve(fleet.variant, replicas=(ServedReplica("r0", "STARTING", "id-a"),), target=1)
    a_gang(fleet, "r0", state="starting", followers=())
    await fleet.lifecycle.look(act=True)
    departures = fleet.lifecycle.departures
    await departures.drain(DrainRequest(target="b", timeout_s=30))
    assert departures.order_for("r0") is None

    a_gang(fleet, "r0", state="starting", number=1)
    await fleet.lifecycle.look(act=True)
    assert departures.order_for("r0") == 30
    await fleet.lifecycle.look(act=True)
    assert departures.order_for("r0") == 30  # until it has heard of it
    assert sum(text == "replica r0: draining" for _, text in fleet.notes) == 1


async def test_a_node_that_ray_does_not_drain_is_used_on():
    fleet = Fleet(0)
    await fleet.lifecycle.look(act=True)
    fleet.no_drain = "Ray does not drain the node"

    with pytest.raises(ClusterError, match="Ray does not drain the node"):
        await fleet.lifecycle.departures.drain(DrainRequest(target="id-a"))

    assert not fleet.lifecycle.departures.drained


async def test_draining_what_is_not_there_names_what_is():
    fleet = Fleet(1)
    await fleet.lifecycle.look(act=True)

    with pytest.raises(UnknownName, match="r0"):
        await fleet.lifecycle.departures.drain(DrainRequest(target="r9"))


async def test_a_replica_that_serve_does_not_know_leaves_the_table():
    fleet = Fleet(1, 1)
    fleet.serve(fleet.variant, "r1", target=2)

    assert await fleet.lifecycle.look(act=True)

    assert {report.replica for report in fleet.registry.reports} == {"r1"}
    assert ("replica-lost", "replica r0: its process is gone") in fleet.notes


async def test_nobody_is_missed_before_all_could_report():
    fleet = Fleet(1, 1)
    fleet.serve(fleet.variant, "r1", target=2)

    await fleet.lifecycle.look(act=False)

    assert len(fleet.registry.reports) == 2


async def test_a_new_controller_knows_whom_it_has_not_heard_yet():
    fleet = Fleet(1, 2)
    fleet.serve(fleet.variant, "r0", "r1", "r2")
    assert fleet.lifecycle.unheard()  # before it has asked Serve

    await fleet.lifecycle.look(act=False)

    assert fleet.lifecycle.unheard()
    report = a_report(replica="r2", version=key_of(fleet.variant).version)
    fleet.registry.report(report, time.monotonic())
    assert not fleet.lifecycle.unheard()


def test_a_lost_plan_is_made_from_what_serve_was_told():
    old, new = a_variant(), a_variant(shape=a_shape(max_num_seqs=7))
    other = a_variant(model="other", variant="other@sim")
    served = {
        key_of(new): Deployed(new.model_dump(mode="json"), target=2),
        key_of(old): Deployed(old.model_dump(mode="json"), target=1),
        key_of(other): Deployed(other.model_dump(mode="json"), target=0),
        GenerationKey("unknown", "1"): Deployed({}, target=5),
    }

    plan = plan_of(served)

    assert plan is not None
    assert {variant.variant: variant for variant in plan.variants} == {
        new.variant: new,
        "other@sim": other,
    }
    assert plan_of({}) is None


async def test_the_old_shape_goes_when_the_new_one_serves():
    new = a_variant(shape=a_shape(max_model_len=8192), replicas=1)
    fleet = Fleet(0, variant=new)
    fleet.serve(a_variant(), "old")
    fleet.registry.report(a_report(replica="old"), time.monotonic() - 5)

    await fleet.lifecycle.look(act=True)

    assert fleet.deployer.calls == [("delete", key_of(a_variant()))]


@pytest.mark.parametrize(
    ("ready", "leaves"),
    [("prefill", False), ("decode", True)],
    ids=["prompts are read, but nobody answers", "answers are written"],
)
async def test_replicas_that_do_all_go_when_others_answer_not_when_others_read(
    ready: str, leaves: bool
):
    new = {
        role: a_variant(variant=f"chat@sim-{role}", role=role, replicas=1)
        for role in ("prefill", "decode")
    }
    fleet = Fleet(variant=new["prefill"])
    fleet.beside = (new["decode"],)
    fleet.serve(a_variant(), "old")
    fleet.registry.report(a_report(replica="old"), time.monotonic() - 5)
    fleet.serve(new[ready], "new")
    fields = {"variant": new[ready].variant, "version": key_of(new[ready]).version}
    fleet.registry.report(a_report(replica="new", **fields), time.monotonic() - 5)

    await fleet.lifecycle.look(act=True)

    assert (("delete", key_of(a_variant())) in fleet.deployer.calls) == leaves


async def test_a_roll_out_whose_engine_fails_stops_and_says_so():
    new = a_variant(shape=a_shape(max_model_len=8192), replicas=1)
    fleet = Fleet(variant=new)
    fleet.serve(a_variant(), "old")
    fleet.registry.report(a_report(replica="old"), time.monotonic() - 5)
    fleet.serve(new, target=1)
    failed = a_report(replica="new", state="failed", version=key_of(new).version)
    fleet.lifecycle.rollouts.heard(failed)

    await fleet.lifecycle.look(act=True)

    assert fleet.deployer.calls == []
    assert fleet.lifecycle.rollouts.stage("chat").startswith("stopped, its engine does not start")


def a_full_node() -> Fleet:
    """An old shape serves, and a new one, whose weights are another commit, finds no room."""
    fields = {"checkpoint": "someone/Model", "shape": a_shape(engine="vllm")}
    old, new = a_variant(**fields), a_variant(**fields, commit="2" * 40, replicas=1)
    fleet = Fleet(variant=new)
    fleet.autoscaler.set(new, 1)
    fleet.serve(old, "old")
    version = key_of(old).version
    fleet.registry.report(a_report(replica="old", version=version), time.monotonic() - 5)
    fleet.serve(new, target=1, replicas=(ServedReplica("new", "STARTING"),))
    fleet.placeless = frozenset({"new"})
    return fleet


async def test_without_room_an_old_replica_goes_when_the_new_weights_are_on_its_node():
    fleet = a_full_node()

    await fleet.lifecycle.look(act=True)
    await asyncio.sleep(0)
    await fleet.lifecycle.look(act=True)
    assert fleet.fetched == [("2" * 40, "id-a")]
    assert fleet.deployer.calls == []
    assert fleet.lifecycle.rollouts.stage("chat").endswith(
        "downloading weights, 50 % of 48.0 GiB on a"
    )

    fleet.may_come.set()
    await asyncio.sleep(0.01)
    await fleet.lifecycle.look(act=True)
    [scaled] = fleet.deployer.calls
    assert (scaled[0], scaled[2]) == ("scale", 0)
    assert ("weights", "the next weights are on a after 0 s") in fleet.notes


async def test_without_the_new_weights_nobody_goes_and_the_roll_out_says_why():
    fleet = a_full_node()
    fleet.refusal = "someone/Model is gated"
    fleet.may_come.set()

    for _ in range(3):
        await fleet.lifecycle.look(act=True)
        await asyncio.sleep(0.01)

    assert fleet.deployer.calls == []
    assert fleet.lifecycle.rollouts.stage("chat") == (
        "stopped, its weights cannot be fetched: someone/Model is gated"
    )
    assert len(fleet.fetched) == 1


async def test_a_replica_without_a_place_is_explained_once():
    fleet = Fleet(1)
    fleet.placeless = frozenset({"r0"})

    await fleet.lifecycle.look(act=True)
    await fleet.lifecycle.look(act=True)

    assert "a has 0 of 4 free" in fleet.lifecycle.places.waiting(fleet.variant.variant)
    assert len([text for kind, text in fleet.notes if kind == "no-place"]) == 1


@pytest.mark.parametrize(("age_s", "told"), [(200.0, True), (30.0, False)])
async def test_a_replica_that_has_a_place_and_says_nothing_is_explained(age_s: float, told: bool):
    fleet = Fleet(1)
    started_s = time.time() - age_s
    starting = ServedReplica("mute", "STARTING", "id-a", started_s)
    fleet.serve(fleet.variant, replicas=(starting,), target=1)

    await fleet.lifecycle.look(act=True)

    why = fleet.lifecycle.places.waiting(fleet.variant.variant)
    assert ("mute has a place on a, but after 120 s its process says nothing" in why) == told


async def test_a_generation_of_no_model_of_the_plan_is_ended():
    fleet = Fleet(1)
    gone = a_variant(model="gone", variant="gone@local")
    fleet.serve(gone, "g1")

    await fleet.lifecycle.look(act=True)

    assert fleet.deployer.calls == [("delete", key_of(gone))]


async def test_what_was_seen_before_another_plan_came_is_not_acted_upon():
    first, second = a_variant(), a_variant(shape=a_shape(max_model_len=8192))
    fleet = Fleet(0, variant=first)  # which serves
    fleet.serve(second, "s1")  # and was replaced by it, until it was asked for again

    async with fleet.lifecycle.acting:  # the plan is being changed
        looking = asyncio.create_task(fleet.lifecycle.look(act=True))
        await asyncio.sleep(0.05)
        fleet.variant = second
    await looking
    assert fleet.deployer.calls == []  # it would have ended `second`

    fleet.registry.report(a_report(replica="s1", version=key_of(second).version), time.monotonic())
    await fleet.lifecycle.look(act=True)
    assert fleet.deployer.calls == [("delete", key_of(first))]


async def test_what_serve_lacks_of_the_plan_is_known():
    fleet = Fleet(0)
    await fleet.lifecycle.look(act=True)
    assert not fleet.lifecycle.absent()

    fleet.serve(fleet.variant, "r0", deleting=True)
    await fleet.lifecycle.look(act=True)
    assert fleet.lifecycle.absent()

    fleet.served.clear()
    await fleet.lifecycle.look(act=True)
    assert fleet.lifecycle.absent()


def test_another_revision_is_another_version_even_where_no_hub_told_its_commit():
    assert key_of(a_variant()) != key_of(a_variant(revision="v2"))
    pinned = [a_variant(revision=name, commit="2" * 40) for name in ("main", "v2")]
    assert key_of(pinned[0]) == key_of(pinned[1])


async def test_what_serve_gave_up_is_asked_for_again_but_not_with_every_look():
    fleet = Fleet(0, 0)
    fleet.serve(fleet.variant, "r0", target=2, gave_up=True)

    await fleet.lifecycle.look(act=True)
    await fleet.lifecycle.look(act=True)

    assert fleet.deployer.calls == [("again", key_of(fleet.variant), 2)]
    [(kind, text)] = [note for note in fleet.notes if "gave up" in note[1]]
    assert (kind, text) == (
        "note",
        f"{fleet.variant.variant}: Ray Serve gave up starting replicas; asked for once more",
    )


async def test_an_engine_that_told_why_it_does_not_start_is_not_asked_for_again():
    fleet = Fleet(0)
    version = key_of(fleet.variant).version
    fleet.lifecycle.rollouts.heard(a_report(replica="r9", state="failed", version=version))
    fleet.serve(fleet.variant, "r0", target=2, gave_up=True)

    await fleet.lifecycle.look(act=True)

    assert [call for call in fleet.deployer.calls if call[0] == "again"] == []


async def test_what_is_given_up_again_and_again_makes_no_more_room_for_itself():
    old, new = a_variant(replicas=1), a_variant(replicas=1, shape=a_shape(max_model_len=8192))
    fleet = Fleet(0, variant=old)
    fleet.serve(old, "r0")
    fleet.variant = new
    fleet.serve(new, target=1, gave_up=True)

    for _ in range(6):
        await fleet.lifecycle.look(act=True)
        fleet.later_s += 200

    assert fleet.deployer.calls == 3 * [("again", key_of(new), 1)]
    assert "does not start" in fleet.lifecycle.rollouts.stage(new.model)
