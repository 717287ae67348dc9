from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.fleet import ReplicaBounds, ScalingPolicy
from placement.scaling import LONGEST_START_S, Decision, Load, ScalingState, beside, decide

POLICY = ScalingPolicy(
    target_utilization=0.5, scale_up_delay_s=1.0, scale_down_delay_s=30.0, scale_to_zero_delay_s=60
)


class Scaled:
    """A model whose replicas start after `start_s`, asked for a decision every half second."""

    def __init__(
        self,
        *,
        bounds: ReplicaBounds | None = None,
        policy: ScalingPolicy = POLICY,
        slots: int = 4,
        replicas: int = 1,
        start_s: float = 0.0,
    ) -> None:
        self.bounds = bounds or ReplicaBounds(min=0, max=20)
        self.policy, self.slots, self.start_s = policy, slots, start_s
        self.replicas, self.state, self.now_s = replicas, ScalingState(), 0.0
        self.ready_at = [0.0] * replicas
        self.history = []

    @property
    def ready(self) -> int:
        return sum(at <= self.now_s for at in self.ready_at)

    def step(self, in_flight: float, queued: float = 0.0) -> Decision:
        decision, self.state = decide(
            self.state,
            Load(in_flight, queued),
            self.policy,
            self.bounds,
            slots_per_replica=self.slots,
            current_replicas=self.replicas,
            ready_replicas=self.ready,
            now_s=self.now_s,
        )
        started = [self.now_s + self.start_s] * max(0, decision.target - self.replicas)
        self.ready_at = [*self.ready_at[: decision.target], *started]
        self.replicas = decision.target
        self.now_s += 0.5
        self.history.append((self.now_s, self.replicas))
        return decision

    def run(self, seconds: float, in_flight: float, queued: float = 0.0) -> int:
        for _ in range(int(seconds * 2)):
            self.step(in_flight, queued)
        return self.replicas


def test_a_rise_takes_effect_after_its_delay_and_not_before() -> None:
    model = Scaled()

    assert model.step(10).target == 1
    assert model.step(10).target == 1
    assert model.step(10).target == 5


def test_a_spike_shorter_than_the_delay_changes_nothing() -> None:
    model = Scaled()
    model.run(10, 1)

    model.step(3)
    model.run(5, 0.5)

    assert {replicas for _, replicas in model.history} == {1}


def test_queued_requests_count_as_load() -> None:
    model = Scaled()

    assert model.run(3, 2, queued=8) == 5


def test_replicas_stay_for_the_whole_down_delay_and_then_go_at_once() -> None:
    model = Scaled()
    model.run(5, 10)

    assert model.run(29, 1) == 5
    assert model.run(4, 1) == 1


def test_replicas_of_the_last_half_minutes_peak_stay() -> None:
    model = Scaled()
    model.run(5, 16)
    model.run(20, 2)
    model.run(4, 9)

    assert model.run(25, 2) == 5


def test_from_zero_the_first_request_starts_a_replica_at_once() -> None:
    model = Scaled(replicas=0)
    model.run(100, 0)

    decision = model.step(0, queued=1)

    assert decision.target == 1
    assert decision.reason.startswith("from zero")


def test_to_zero_only_after_the_idle_delay() -> None:
    model = Scaled()
    model.run(40, 1)

    assert model.run(59.5, 0) == 1
    assert model.run(2, 0) == 0


def test_what_still_starts_is_not_idle_yet() -> None:
    model = Scaled(start_s=200.0)
    model.ready_at = [200.0]

    assert model.run(199, 0) == 1
    assert model.run(60, 0) == 1
    assert model.run(3, 0) == 0


def test_what_never_gets_ready_gives_its_place_back_in_the_end() -> None:
    model = Scaled()
    model.ready_at = [math.inf]

    assert model.run(LONGEST_START_S, 0) == 1
    assert model.run(62, 0) == 0


def test_a_model_that_may_not_scale_to_zero_keeps_its_minimum() -> None:
    model = Scaled(bounds=ReplicaBounds(min=2, max=5), replicas=2)

    assert model.run(300, 0) == 2


def test_bounds_hold_at_once() -> None:
    model = Scaled(bounds=ReplicaBounds(min=2, max=4), replicas=1)

    assert model.step(0).target == 2
    model.replicas = 9
    assert model.step(0).target == 4


def test_nothing_is_removed_while_the_rest_still_starts() -> None:
    model = Scaled(start_s=100.0)
    model.run(5, 16)

    assert model.run(60, 3.5) == 8
    assert model.ready == 1
    assert model.run(60, 3.5) == 2


@pytest.mark.parametrize("start_s", [0.0, 10.0])
def test_five_a_hundred_five_and_no_requests_a_second(start_s: float) -> None:
    """Each request takes 2 s; what does not find a slot waits."""
    model = Scaled(start_s=start_s, slots=16, policy=ScalingPolicy(scale_to_zero_delay_s=60))
    waiting, peaks = 0.0, []
    for seconds, rate in ((60, 5), (120, 100), (120, 5), (120, 0)):
        seen = []
        for _ in range(seconds * 2):
            capacity = model.ready * model.slots
            wanted = rate * 2 + waiting
            served = min(wanted, capacity)
            waiting = (
                max(0.0, waiting + rate * 0.5 - (served / 2) * 0.5) if wanted > capacity else 0
            )
            model.step(served, waiting)
            seen.append(model.replicas)
        peaks.append((max(seen), seen[-1]))

    calm, busy, calm_again, nothing = peaks
    assert calm == (1, 1)
    assert busy[1] >= math.ceil(200 / (0.7 * 16))
    assert calm_again[1] == 1
    assert nothing[1] == 0
    counts = [replicas for _, replicas in model.history]
    turns = [b - a for a, b in pairwise(counts) if a != b]
    assert sum(first * second < 0 for first, second in pairwise(turns)) <= 1


@given(
    level=st.floats(0.5, 60),
    noise=st.lists(st.floats(-0.3, 0.3), min_size=240, max_size=400),
    low=st.integers(0, 3),
)
def test_a_load_that_only_trembles_never_makes_replicas_come_and_go(
    level: float, noise: list[float], low: int
) -> None:
    model = Scaled(bounds=ReplicaBounds(min=low, max=30), replicas=max(low, 1))

    for shake in noise:
        model.step(max(0.01, level + shake))

    counts = [replicas for _, replicas in model.history]
    falls = sum(b < a for a, b in pairwise(counts))
    changes = sum(b != a for a, b in pairwise(counts))
    assert falls <= 1
    assert changes <= 4


@given(
    loads=st.lists(st.floats(0, 200), min_size=1, max_size=150),
    low=st.integers(0, 4),
    more=st.integers(1, 10),
)
def test_replicas_stay_within_bounds_and_falls_are_a_down_delay_apart_from_rises(
    loads: list[float], low: int, more: int
) -> None:
    model = Scaled(bounds=ReplicaBounds(min=low, max=low + more), replicas=low)
    last_rise = -math.inf

    for load in loads:
        before, now = model.replicas, model.now_s
        after = model.step(load).target
        assert low <= after <= low + more
        if after > before:
            last_rise = now
        if 0 < after < before:
            assert now - last_rise >= POLICY.scale_down_delay_s


def test_a_load_at_the_edge_keeps_the_replica_that_it_almost_needs() -> None:
    model = Scaled()
    model.run(10, 2.1)

    assert model.run(120, 1.9) == 2
    assert model.run(60, 1.7) == 1


def test_what_still_runs_on_draining_replicas_does_not_wake_a_model() -> None:
    state, bounds = ScalingState(), ReplicaBounds(min=0, max=4)
    numbers = {"slots_per_replica": 8, "current_replicas": 0, "ready_replicas": 0}

    asleep, state = decide(state, Load(3.0), ScalingPolicy(), bounds, **numbers, now_s=0)
    awake, _ = decide(state, Load(3.0, queued=1), ScalingPolicy(), bounds, **numbers, now_s=1)

    assert (asleep.target, awake.target) == (0, 1)


@pytest.mark.parametrize(
    ("decoding", "planned", "replicas"),
    [
        (3, (3, 2), 2),
        (6, (3, 2), 4),
        (4, (3, 2), 3),  # rounded up
        (1, (4, 1), 1),  # at least one
        (0, (3, 2), 0),
        (30, (3, 2), 8),  # within the bounds
        (2, (0, 0), 2),  # a plan that begins with none
    ],
)
def test_prefill_replicas_keep_the_plans_proportion(
    decoding: int, planned: tuple[int, int], replicas: int
):
    bounds = ReplicaBounds(min=0, max=8)

    found = beside(decoding, planned_decoding=planned[0], planned=planned[1], bounds=bounds)

    assert found == replicas
