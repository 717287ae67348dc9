"""How many replicas a model should have now: a function of load and of what was seen before.

Load is what requests occupy: those in engines and those that wait. Up fast, down slowly: a rise must
last `scale_up_delay_s`; a fall takes effect when nothing in the last `scale_down_delay_s` asked for
more. So a load that swings faster than that window keeps the replicas of its peaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.fleet import ReplicaBounds, ScalingPolicy

SMOOTHING_S = 2.0  # load is averaged over this long
LONGEST_START_S = 1800.0  # after which a model without a ready replica counts as idle too
HYSTERESIS = 0.1  # replicas go only when this share of what remains would be spare


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one model, over all gateways, averaged over the time since the last decision."""

    in_flight: float
    queued: float = 0.0

    @property
    def concurrency(self) -> float:
        """Requests that want a slot."""
        return self.in_flight + self.queued


@dataclass(frozen=True, slots=True)
class Moment:
    """A value and when it was seen."""

    time_s: float
    value: float


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What `decide` remembers; the default is the state before the first decision."""

    loads: tuple[Moment, ...] = ()  # within SMOOTHING_S
    peaks: tuple[Moment, ...] = ()  # desired replicas, each higher than all that came later
    first_s: float | None = None
    above_since_s: float | None = None
    idle_since_s: float | None = None
    starting_since_s: float | None = None  # replicas, none of which is ready


@dataclass(frozen=True, slots=True)
class Decision:
    """The replica count to aim at, and why."""

    target: int
    reason: str


def decide(
    state: ScalingState,
    load: Load,
    policy: ScalingPolicy,
    bounds: ReplicaBounds,
    *,
    slots_per_replica: int,
    current_replicas: int,
    ready_replicas: int,
    now_s: float,
) -> tuple[Decision, ScalingState]:
    """The next replica count, and the state for the next call.

    desired = ceil(concurrency / (target_utilization x slots_per_replica)), within `bounds`. From
    zero at once when anything waits (what is in flight then finishes on draining replicas); to zero
    only after `scale_to_zero_delay_s` without a request and with `bounds.min` 0, not counting the
    time (of at most `LONGEST_START_S`) in which no replica is ready yet. Down only as far as leaves
    `HYSTERESIS` to spare, so that a load at the edge does not swing the count, and only when as
    many are ready as would remain, so that no serving replica goes while others still start. Calls
    must not go back in time.
    """
    state = _remember(state, load, now_s, starts=current_replicas > 0 and not ready_replicas)
    smoothed = sum(moment.value for moment in state.loads) / len(state.loads)
    per_replica = policy.target_utilization * slots_per_replica
    desired = _replicas(smoothed / per_replica, bounds)
    keep = _replicas(smoothed / (per_replica * (1 - HYSTERESIS)), bounds)
    state = _remember_desire(
        state, keep, above=desired > current_replicas, policy=policy, now_s=now_s
    )
    decision = _decide(
        state,
        load,
        policy,
        bounds,
        desired=desired,
        current=current_replicas,
        ready=ready_replicas,
        now_s=now_s,
    )
    return decision, state


def beside(decoding: int, *, planned_decoding: int, planned: int, bounds: ReplicaBounds) -> int:
    """Prefill replicas beside so many decode replicas: in the proportion of the plan.

    Rounded up, within `bounds`, and at least one as long as there is a decode replica. Where more
    prompts come than they can read, gateways leave some to the decode replicas, whose load grows.
    """
    if not decoding:
        return bounds.min
    return _replicas(decoding * max(planned, 1) / max(planned_decoding, 1), bounds)


def _decide(
    state: ScalingState,
    load: Load,
    policy: ScalingPolicy,
    bounds: ReplicaBounds,
    *,
    desired: int,
    current: int,
    ready: int,
    now_s: float,
) -> Decision:
    busy = f"{load.in_flight:.1f} requests in flight, {load.queued:.1f} queued"
    allowed = _within(current, bounds, at_least=0)
    if allowed != current:
        return Decision(allowed, f"outside replicas {bounds.min} to {bounds.max}")
    if current == 0:
        return Decision(desired if load.queued > 0 else 0, f"from zero: {busy}")
    idle_s = _since(state.idle_since_s, now_s)
    if bounds.min == 0 and idle_s >= policy.scale_to_zero_delay_s:
        return Decision(0, f"idle for {idle_s:.0f} s")
    if _since(state.above_since_s, now_s) >= policy.scale_up_delay_s:
        return Decision(desired, f"{busy}: {desired} replicas wanted")
    peak = int(state.peaks[0].value)
    if peak < current and _since(state.first_s, now_s) >= policy.scale_down_delay_s:
        return _down(policy, current=current, peak=peak, ready=ready, busy=busy)
    return Decision(current, busy)


def _down(policy: ScalingPolicy, *, current: int, peak: int, ready: int, busy: str) -> Decision:
    if ready < peak:
        return Decision(current, f"waiting for {peak} ready replicas before removing any")
    return Decision(peak, f"at most {peak} wanted in {policy.scale_down_delay_s:g} s; now {busy}")


def _since(moment_s: float | None, now_s: float) -> float:
    return -1.0 if moment_s is None else now_s - moment_s


def _remember(state: ScalingState, load: Load, now_s: float, *, starts: bool) -> ScalingState:
    recent = tuple(moment for moment in state.loads if moment.time_s > now_s - SMOOTHING_S)
    idle_since = state.idle_since_s if state.idle_since_s is not None else now_s
    starting_since = None
    if starts:
        starting_since = now_s if state.starting_since_s is None else state.starting_since_s
        if now_s - starting_since < LONGEST_START_S:
            idle_since = now_s  # nobody can ask yet
    return ScalingState(
        loads=(*recent, Moment(now_s, load.concurrency)),
        peaks=state.peaks,
        first_s=now_s if state.first_s is None else state.first_s,
        above_since_s=state.above_since_s,
        idle_since_s=idle_since if load.concurrency <= 0 else None,
        starting_since_s=starting_since,
    )


def _remember_desire(
    state: ScalingState, keep: int, *, above: bool, policy: ScalingPolicy, now_s: float
) -> ScalingState:
    """Of what to keep, only values that can still be the window's largest: each beats all later."""
    oldest = now_s - policy.scale_down_delay_s
    peaks = tuple(
        moment for moment in state.peaks if moment.time_s >= oldest and moment.value > keep
    )
    above_since = None
    if above:
        above_since = now_s if state.above_since_s is None else state.above_since_s
    return ScalingState(
        loads=state.loads,
        peaks=(*peaks, Moment(now_s, keep)),
        first_s=state.first_s,
        above_since_s=above_since,
        idle_since_s=state.idle_since_s,
        starting_since_s=state.starting_since_s,
    )


def _replicas(wanted: float, bounds: ReplicaBounds) -> int:
    return _within(math.ceil(wanted - 1e-9), bounds, at_least=1)


def _within(replicas: int, bounds: ReplicaBounds, *, at_least: int) -> int:
    return min(max(replicas, bounds.min, at_least), bounds.max)
