"""Loads of several gateways become one target per variant."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.autoscaler import Autoscaler, answering, shared_out
from gateway.endpoints import ModelLoad
from placement.errors import ConfigError
from placement.fleet import ReplicaBounds, ScalingPolicy
from placement.plan import Variant
from placement.routing_policy import RoutingPolicy
from tests.builders import a_shape, a_variant

QUICK = ScalingPolicy(scale_up_delay_s=0, scale_down_delay_s=5, scale_to_zero_delay_s=10)


def a_sleeper() -> Variant:
    return a_variant(
        bounds=ReplicaBounds(min=0, max=4), scaling=QUICK, shape=a_shape(max_num_seqs=8)
    )


def a_load(in_flight: float = 0.0, queued: int = 0) -> ModelLoad:
    return ModelLoad(in_flight=in_flight, queued=queued, requests_total=0)


def run(
    scaler: Autoscaler, variant: Variant, load: ModelLoad, *, from_s: float, for_s: float
) -> int:
    """Report `load` twice a second and follow every decision; the target at the end."""
    for step in range(int(for_s * 2)):
        now_s = from_s + step / 2
        scaler.observe("g1", {variant.model: load}, now_s)
        decision = scaler.decide(variant, scaler.target(variant), now_s)
        if decision is not None:
            scaler.set(variant, decision.target)
    return scaler.target(variant)


def test_an_idle_model_goes_to_zero_and_a_waiting_request_brings_it_back():
    scaler, variant = Autoscaler(), a_sleeper()
    scaler.adopt(variant, running=False)

    assert run(scaler, variant, a_load(), from_s=0, for_s=15) == 0
    assert run(scaler, variant, a_load(queued=1), from_s=15, for_s=1) == 1


def test_load_over_all_gateways_counts():
    scaler, variant = Autoscaler(), a_sleeper()
    scaler.adopt(variant, running=False)
    scaler.observe("g1", {"chat": a_load(6)}, now_s=0)
    scaler.observe("g2", {"chat": a_load(6)}, now_s=0)

    assert scaler.load("chat").in_flight == 12
    assert scaler.decide(variant, 1, now_s=0).target == 3  # 12 / (0.7 x 8), rounded up


def test_without_a_gateway_nothing_is_decided():
    scaler, variant = Autoscaler(), a_sleeper()
    scaler.adopt(variant, running=False)
    scaler.observe("g1", {}, now_s=0)

    assert scaler.decide(variant, 1, now_s=100) is None


def test_a_running_variant_keeps_its_count_when_it_is_deployed_again():
    scaler = Autoscaler()
    scaler.adopt(a_sleeper(), running=False)
    scaler.set(a_sleeper(), 3)

    assert scaler.adopt(a_sleeper(), running=True) == 3
    assert scaler.adopt(a_variant(bounds=ReplicaBounds(min=1, max=2)), running=True) == 2
    assert scaler.adopt(a_variant(bounds=ReplicaBounds(min=1, max=2)), running=False) == 1


def test_variants_of_one_model_share_its_load_by_their_slots():
    scaler = Autoscaler()
    small = a_sleeper()
    large = small.model_copy(update={"variant": "chat@h100-tp8", "shape": a_shape(max_num_seqs=24)})
    for variant in (small, large):
        scaler.adopt(variant, running=False)
    scaler.observe("g1", {"chat": a_load(44)}, now_s=0)

    decisions = [scaler.decide(v, 1, 0, (small, large)) for v in (small, large)]

    # 44 / 0.7 slots are wanted, a quarter of them at 8 a replica, the others at 24
    assert [decision.target for decision in decisions if decision] == [2, 2]


def test_weighted_variants_share_the_load_by_their_weights():
    scaler = Autoscaler()
    routing = RoutingPolicy(weights={"chat@local-tp1": 0.75, "chat.canary@local-tp1": 0.25})
    stable = a_sleeper().model_copy(update={"routing": routing, "variant": "chat@local-tp1"})
    canary = stable.model_copy(update={"variant": "chat.canary@local-tp1"})
    for variant in (stable, canary):
        scaler.adopt(variant, running=False)
    scaler.observe("g1", {"chat": a_load(16)}, now_s=0)

    decisions = [scaler.decide(v, 1, 0, (stable, canary)) for v in (stable, canary)]

    # three quarters of 16 / 0.7 slots at 8 a replica; the canary has enough with the one it has
    assert [decision.target if decision else None for decision in decisions] == [3, None]


def two_roles(**prefill: Any) -> tuple[Variant, Variant]:
    """Three replicas answer for each two that read, in the plan."""
    bounds = ReplicaBounds(min=0, max=20)
    common = {"bounds": bounds, "scaling": QUICK, "shape": a_shape(max_num_seqs=8)}
    read = {"variant": "chat@a-prefill", "role": "prefill", "replicas": 2, **prefill}
    write = {"variant": "chat@b-decode", "role": "decode", "replicas": 3}
    return a_variant(**{**common, **read}), a_variant(**{**common, **write})


def test_prefill_replicas_follow_the_decode_replicas_in_the_plans_proportion():
    scaler, (reader, writer) = Autoscaler(), two_roles()
    for variant in (reader, writer):
        scaler.adopt(variant, running=False)
    scaler.observe("g1", {"chat": a_load(in_flight=33)}, now_s=0)

    decision = scaler.decide(writer, 3, 0, (reader, writer))
    assert decision is not None
    assert decision.target == 6  # 33 / (0.7 x 8), rounded up: readers take no share of the load
    scaler.set(writer, decision.target)

    followed = scaler.decide(reader, 2, 0, (reader, writer))
    assert followed is not None
    assert followed.target == 4
    assert followed.reason == "beside 6 decode replicas"
    scaler.set(reader, 4)
    assert scaler.decide(reader, 2, 0, (reader, writer)) is None


def test_what_an_operator_asks_for_is_shared_out_to_those_that_answer():
    reader, writer = two_roles()
    whole = a_variant(variant="chat@c", bounds=ReplicaBounds(min=1, max=4))
    variants = answering((reader, writer, whole))

    assert [count for _, count in shared_out(variants, 7)] == [6, 1]
    assert [count for _, count in shared_out(variants, 23)] == [20, 3]
    with pytest.raises(ConfigError, match=r"chat: 25 replicas are outside of 1\.\.24"):
        shared_out(variants, 25)


def test_whole_replicas_need_nobody_beside_them():
    scaler, (reader, writer) = Autoscaler(), two_roles()
    whole = a_variant(variant="chat@c", shape=a_shape(max_num_seqs=8), replicas=1)
    for variant in (reader, writer, whole):
        scaler.adopt(variant, running=False)
    scaler.set(whole, 9)
    scaler.observe("g1", {"chat": a_load()}, now_s=0)

    assert scaler.decide(reader, 2, 0, (reader, writer, whole)) is None


def test_without_a_gateway_prefill_replicas_stay_as_they_are():
    scaler, (reader, writer) = Autoscaler(), two_roles()
    scaler.set(writer, 9)

    assert scaler.decide(reader, 2, 0, (reader, writer)) is None
