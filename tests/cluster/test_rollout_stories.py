"""Roll-outs in a simulated cluster, while engines die, plans change and nodes go."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaler import Autoscaler
from cluster.event_log import EventLog
from cluster.generations import GenerationKey, key_of
from cluster.lifecycle import Lifecycle
from cluster.messages import DrainRequest, ReplicaReport
from cluster.registry import Registry
from placement.fleet import ReplicaBounds
from placement.plan import Variant
from tests.builders import a_shape, a_variant
from tests.cluster.recording_counts import RecordingRooms
from tests.cluster.sim_serve import SimServe, report_of

LONG_S = 120  # by then every roll-out has ended
BOUNDS = ReplicaBounds(min=1, max=8)


def version(number: int, *, pool: str = "p", replicas: int = 2, rate: float = 2.0) -> Variant:
    """One with an odd number does not start."""
    return a_variant(
        variant=f"chat@{pool}",
        pool=pool,
        replicas=replicas,
        bounds=BOUNDS,
        shape=a_shape(max_num_seqs=number),
        capacity_requests_per_s=rate,
    )


async def no_fetch(variant: Variant, node_id: str, tell: Callable[[str], None]) -> None:
    """All weights are everywhere."""


class Story:
    """A fleet of one model on a simulated cluster. `wrongs` are wishes that break a promise."""

    def __init__(self, *nodes: tuple[str, str, int], seed: int = 0) -> None:
        self.serve = SimServe(nodes, seed)
        self.serve.asked = self.judge
        self.plan: tuple[Variant, ...] = ()
        self.wrongs: list[str] = []
        self.events = EventLog(Path(os.devnull))
        self.restart_controller()

    def restart_controller(self) -> None:
        """All that it knew is gone; counts come from Serve."""
        self.registry, self.autoscaler = Registry(), Autoscaler()
        served = {each.variant.variant: each.target for key, each in self.serve.generations.items()
                  if key in self.wanted}  # fmt: skip
        self.autoscaler.restore(served)
        self.lifecycle = Lifecycle(
            self.registry,
            self.autoscaler,
            self.serve,
            variants=lambda: self.plan,
            events=self.events,
            take=self.serve.census,
            drain_node=lambda *_: None,
            fetch=no_fetch,
            rooms=RecordingRooms(),
        )
        for replica in self.serve.replicas:  # `Fleet.settling` waits for these
            if replica.state == "RUNNING":
                self.hear(report_of(replica, "ready" if replica.healthy else "unhealthy"))

    @property
    def wanted(self) -> set[GenerationKey]:
        return {key_of(variant) for variant in self.plan}

    @property
    def promised(self) -> int:
        return sum(map(self.autoscaler.target, self.plan))

    def hear(self, report: ReplicaReport) -> None:
        if self.registry.report(report, self.serve.now_s - 0.5):
            self.lifecycle.rollouts.heard(report)

    def apply(self, *variants: Variant) -> None:
        running = {variant.variant for variant in self.plan}
        self.plan = variants
        self.lifecycle.rollouts.forgive()
        for variant in variants:
            self.autoscaler.adopt(variant, running=variant.variant in running)
        for variant, count in zip(
            variants, self.lifecycle.departures.counts(variants).values(), strict=True
        ):
            self.serve.deploy(variant, count)

    async def seconds(self, count: int) -> None:
        for _ in range(count):
            self.serve.second(
                self.hear, lambda name: self.lifecycle.departures.order_for(name) is not None
            )
            await self.lifecycle.look(act=True)

    def judge(self, key: GenerationKey, target: int) -> None:
        """Whoever goes without need was promised to somebody."""
        if key in self.wanted:
            return
        here = self.serve.generations[key]
        running = [each for each in here.replicas if each.state == "RUNNING"]
        lost = min(max(len(running) - target, 0), sum(each.serves for each in running))
        before = self.serve.serving(self.serve.generations)
        if not lost or before - lost >= self.promised:
            return
        waiting = [
            each for each in self.serve.replicas if each.key in self.wanted and not each.node
        ]
        pools = {variant.pool for variant in self.plan}
        needed = any(not self.serve.free(pool) for pool in pools if waiting)
        helps = any(
            self.serve.nodes[each.node][0] == self.serve.generations[other.key].variant.pool
            for each in running
            for other in waiting
        )
        if lost > 1 or not needed or not helps:
            self.wrongs.append(
                f"{key}: {len(running)} -> {target}, of {before} for {self.promised} promised; "
                f"waiting {len(waiting)}, helps {helps}"
            )

    def left(self) -> dict[GenerationKey, int]:
        """Replicas that serve, of all that Serve has not forgotten."""
        return {key: self.serve.serving([key]) for key in self.serve.generations}


async def a_story(*nodes: tuple[str, str, int], old: Variant) -> Story:
    story = Story(*nodes)
    story.apply(old)
    await story.seconds(10)
    assert story.left() == {key_of(old): old.replicas}
    return story


@pytest.mark.parametrize("gpus", [3, 2], ids=["with room for one more", "without room"])
async def test_a_new_version_takes_over_and_nothing_is_left_of_the_old_one(gpus: int):
    story = await a_story(("n", "p", gpus), old=version(2))

    story.apply(version(4))
    await story.seconds(LONG_S)

    assert story.left() == {key_of(version(4)): 2}
    assert story.lifecycle.rollouts.stage("chat") == ""
    assert story.wrongs == []


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("spare", [0, 1])
async def test_a_broken_version_leaves_the_old_one_as_it_was(replicas: int, spare: int):
    old = version(2, replicas=replicas)
    story = await a_story(("n", "p", replicas + spare), old=old)

    story.apply(version(3, replicas=replicas))
    await story.seconds(LONG_S)

    assert story.left()[key_of(old)] == replicas
    assert story.lifecycle.rollouts.stage("chat").startswith("stopped, its engine does not start")
    assert story.wrongs == []


async def test_after_a_broken_version_a_third_one_or_the_first_one_again_takes_over():
    for after in (version(4, replicas=1), version(2, replicas=1)):
        story = await a_story(("n", "p", 1), old=version(2, replicas=1))
        story.apply(version(3, replicas=1))
        await story.seconds(30)

        story.apply(after)
        await story.seconds(LONG_S)

        assert story.left() == {key_of(after): 1}
        assert story.lifecycle.rollouts.stage("chat") == ""


async def test_a_broken_version_is_undone_by_a_controller_that_did_not_see_it_begin():
    story = await a_story(("n", "p", 1), old=version(2, replicas=1))
    story.apply(version(3, replicas=1))
    await story.seconds(12)
    assert story.left()[key_of(version(2))] == 0
    story.restart_controller()

    await story.seconds(LONG_S)

    assert story.left()[key_of(version(2))] == 1


async def test_nobody_goes_for_a_replica_that_waits_for_gpus_of_another_pool():
    story = await a_story(("n", "p", 2), ("m", "q", 0), old=version(2))

    story.apply(version(4, pool="q"))
    await story.seconds(LONG_S)
    assert story.left()[key_of(version(2))] == 2

    story.serve.nodes["m"] = ("q", 2)
    await story.seconds(LONG_S)
    assert story.left() == {key_of(version(4, pool="q")): 2}


async def test_many_small_replicas_stay_until_the_large_one_that_replaces_them_serves():
    small, large = version(2, replicas=4, rate=1.0), version(4, pool="q", replicas=1, rate=4.0)
    story = await a_story(("n", "p", 4), ("m", "q", 1), old=small)

    story.apply(large)
    await story.seconds(2)
    assert story.left()[key_of(small)] == 4
    await story.seconds(LONG_S)

    assert story.left() == {key_of(large): 1}


async def test_an_old_replica_that_is_not_well_keeps_no_roll_out_from_ending():
    story = await a_story(("n", "p", 3), old=version(2, replicas=1))
    story.serve.replicas[0].healthy = False

    story.apply(version(4, replicas=1))
    await story.seconds(LONG_S)

    assert story.left() == {key_of(version(4)): 1}


async def test_who_is_stopping_but_has_not_said_so_is_not_counted_with():
    story = await a_story(("n", "p", 6), old=version(2, replicas=3))
    story.serve.replicas[0].healthy = False

    story.apply(version(4, replicas=2))
    await story.seconds(LONG_S)

    assert story.wrongs == []


async def test_replicas_that_were_starting_on_a_host_that_died_come_elsewhere():
    story = Story(("dies", "p", 3))
    story.apply(version(2, replicas=3))
    await story.seconds(2)
    story.serve.nodes["other"] = ("p", 3)

    story.serve.lose("dies")
    [generation] = story.serve.generations.values()
    assert generation.gave_up
    await story.seconds(30)

    assert story.left() == {key_of(version(2, replicas=3)): 3}


Event = tuple[str, int, int]  # what, which one, and the seconds until the next
EVENTS = st.tuples(
    st.sampled_from(
        ["plan", "plan", "plan", "death", "health", "drain", "scale", "restart", "node"]
    ),
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 3, 6, 9, 15]),
)


async def happen(story: Story, what: str, which: int) -> None:
    """One of the things that may."""
    serve, [variant] = story.serve, story.plan
    placed = [each for each in serve.replicas if each.node]
    running = [each for each in placed if each.state == "RUNNING"]
    ready = [each for each in story.registry.reports if each.state == "ready"]
    nodes = list(serve.nodes)
    if what == "plan":
        number, pool = 2 + which % 5, "ppq"[which % 3]
        rate, replicas = [1.0, 2.0, 4.0][which // 15 % 3], 1 + which // 45 % 3
        story.apply(version(number, pool=pool, replicas=replicas, rate=rate))
    elif what == "death" and placed:
        serve.die(placed[which % len(placed)])
    elif what == "health" and running:
        replica = running[which % len(running)]
        replica.healthy = not replica.healthy
    elif what == "drain" and ready:
        request = DrainRequest(target=ready[which % len(ready)].replica)
        await story.lifecycle.departures.drain(request)
    elif what == "scale":
        await story.lifecycle.departures.scale(variant, 1 + which % 3)
    elif what == "restart":
        story.restart_controller()
    elif what == "node" and len(nodes) > 2:
        serve.lose(nodes[which % len(nodes)])


async def end(story: Story) -> None:
    """Nothing more happens: the last plan is carried out, or undone."""
    for replica in story.serve.replicas:
        replica.healthy = True
    story.serve.nodes |= {"late": ("p", 3), "later": ("q", 3)}
    await story.seconds(LONG_S)
    [variant] = story.plan
    key, left = key_of(variant), story.left()
    assert story.wrongs == []
    if variant.shape.max_num_seqs % 2:
        assert left[key] == 0
        assert sum(left.values()) >= 1 or set(left) == {key}
    else:
        assert left == {key: story.promised}
        assert story.lifecycle.rollouts.stage("chat") == ""


@given(
    gpus=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    others=st.integers(0, 2),
    replicas=st.integers(1, 3),
    seed=st.integers(0, 99),
    events=st.lists(EVENTS, min_size=2, max_size=10),
)
@settings(max_examples=60)
def test_whatever_happens_no_promise_is_broken_without_need_and_all_comes_to_an_end(
    gpus: list[int], others: int, replicas: int, seed: int, events: list[Event]
):
    async def tell() -> None:
        nodes = [(f"n{number}", "p", count) for number, count in enumerate(gpus)]
        story = Story(*nodes, ("m", "q", others), seed=seed)
        story.apply(version(2, replicas=replicas))
        await story.seconds(10)
        for what, which, seconds in events:
            await happen(story, what, which)
            await story.seconds(seconds)
            assert story.wrongs == []
        await end(story)

    asyncio.run(tell())
