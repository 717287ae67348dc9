"""What the planner prefers: price, throughput, headroom, spread, spares."""

from __future__ import annotations

from typing import Any

import pytest

from placement.fleet import Demand, Objective, ReplicaBounds
from placement.inventory import Pool
from tests.placement.builders import (
    a_pool,
    a_wish,
)
from tests.placement.plans import plan_for, the_only


def test_the_cheapest_pool_that_carries_the_demand_wins() -> None:
    dear, cheap = a_pool("h100"), a_pool("rtx4090", "RTX-4090")
    wish = a_wish(model="mistral-7b", demand=Demand(requests_per_s=1.0))

    variant = the_only(plan_for(wish, pools=[dear, cheap]))

    assert variant.pool == "rtx4090"


def test_a_service_level_that_the_cheapest_pool_misses_moves_the_model() -> None:
    dear, cheap = a_pool("h100"), a_pool("l4", "L4", price_per_gpu_hour=0.5)
    wish = a_wish(
        model="mistral-7b", precision=("bf16",), tensor_parallel_size=1,
        slo=Objective(tpot_p95_ms=20),
    )  # fmt: skip

    assert the_only(plan_for(wish, pools=[dear, cheap])).pool == "h100"


def test_a_price_that_nobody_knows_does_not_look_like_a_gift() -> None:
    known, unknown = a_pool("l40s", "L40S"), a_pool("l4", "RTX-6000-Ada")

    assert the_only(plan_for(a_wish(model="mistral-7b"), pools=[known, unknown])).pool == "l40s"


def test_throughput_prefers_the_pool_that_serves_most() -> None:
    fast, cheap = a_pool("h100"), a_pool("rtx4090", "RTX-4090")

    plan = plan_for(a_wish(model="mistral-7b"), pools=[fast, cheap], objective="throughput")

    assert the_only(plan).pool == "h100"


@pytest.mark.parametrize(
    ("rate", "bounds", "replicas"),
    [
        (None, ReplicaBounds(min=0, max=4), 1),
        (None, ReplicaBounds(min=2, max=4), 2),
        (0.0, ReplicaBounds(min=0, max=4), 0),
        (0.1, ReplicaBounds(min=0, max=4), 1),
        (0.1, ReplicaBounds(min=3, max=4), 3),
        (30.0, ReplicaBounds(min=0, max=8), 2),
    ],
)
def test_as_many_replicas_start_as_the_demand_needs(
    rate: float | None, bounds: ReplicaBounds, replicas: int
) -> None:
    demand = None if rate is None else Demand(requests_per_s=rate)
    wish = a_wish(
        model="mistral-small-3.2", precision=("bf16",), demand=demand, replicas=bounds,
        tensor_parallel_size=1, max_model_len=32768,
    )  # fmt: skip

    assert the_only(plan_for(wish)).replicas == replicas


def zoned(name: str, zone: str, **changes: Any) -> Pool:
    return a_pool(name, labels={"zone": zone}, **changes)


def test_two_replicas_are_in_two_zones_where_that_costs_nothing() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(min=2, max=2), tensor_parallel_size=1)
    here, there = zoned("h1", "a"), zoned("h2", "b")
    dearer = zoned("h2", "b", price_per_gpu_hour=9.0)

    spread = plan_for(wish, pools=[here, there])
    costly = plan_for(wish, pools=[here, dearer])
    packed = plan_for(wish.model_copy(update={"spread": False}), pools=[here, there])

    assert [(v.pool, v.replicas) for v in spread.variants] == [("h1", 1), ("h2", 1)]
    assert [(v.pool, v.replicas) for v in costly.variants] == [("h1", 2)]
    assert [(v.pool, v.replicas) for v in packed.variants] == [("h1", 2)]


def test_pools_that_are_alike_are_one_to_the_solver_and_keep_their_names() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(min=3, max=5), tensor_parallel_size=8)

    plan = plan_for(wish, pools=[a_pool("h1"), a_pool("h2", nodes=2)])

    assert [(v.variant, v.replicas) for v in plan.variants] == [
        ("chat@h1-tp8", 1),
        ("chat@h2-tp8", 2),
    ]
    assert [(v.bounds.min, v.bounds.max) for v in plan.variants] == [(1, 3), (2, 2)]


def test_a_model_is_served_by_two_kinds_of_gpus_when_neither_suffices_alone() -> None:
    wish = a_wish(model="mistral-7b", tensor_parallel_size=1, replicas=ReplicaBounds(min=3, max=3))

    plan = plan_for(wish, pools=[a_pool(gpus_per_node=2), a_pool("l40s", "L40S", gpus_per_node=2)])

    assert plan.status == "optimal"
    assert sorted((v.pool, v.replicas) for v in plan.variants) == [("h100", 1), ("l40s", 2)]


def test_spare_nodes_stay_empty() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(min=2, max=2), tensor_parallel_size=8)

    enough = plan_for(wish, pools=[a_pool(nodes=3)], spare_nodes=1)
    short = plan_for(wish, pools=[a_pool(nodes=2)], spare_nodes=1)

    used = {node.node for v in enough.variants for replica in v.placement for node in replica}
    assert used == {"h100-0", "h100-1"}
    assert short.status == "infeasible"


def test_no_more_of_a_demand_depends_on_spot_nodes_than_allowed() -> None:
    demand = Demand(requests_per_s=60.0)
    wish = a_wish(
        model="mistral-7b", demand=demand, replicas=ReplicaBounds(max=16), tensor_parallel_size=1
    )
    pools = [a_pool("spot", spot=True, price_per_gpu_hour=0.5), a_pool("firm", nodes=2)]

    free = plan_for(wish, pools=pools)
    half = plan_for(wish, pools=pools, max_spot_share=0.5)

    assert {v.pool for v in free.variants} == {"spot"}
    firm = sum(v.replicas * v.capacity_requests_per_s for v in half.variants if v.pool == "firm")
    assert firm >= 30 * (1 - 1e-6)
    assert {v.pool for v in half.variants} == {"spot", "firm"}


def test_throughput_fills_what_there_is_up_to_the_replica_limit() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(max=6), tensor_parallel_size=1)

    plan = plan_for(wish, pools=[a_pool()], objective="throughput")

    assert the_only(plan).replicas == 6


def test_headroom_is_that_of_the_fullest_model() -> None:
    wishes = [
        a_wish(
            name, "mistral-7b", demand=Demand(requests_per_s=rate),
            replicas=ReplicaBounds(max=8), tensor_parallel_size=1,
        )
        for name, rate in (("a", 10.0), ("b", 30.0))
    ]  # fmt: skip

    plan = plan_for(*wishes, objective="headroom")

    assert {v.model: v.replicas for v in plan.variants} == {"a": 2, "b": 6}
    assert plan.objective == pytest.approx(max(v.predicted.utilization for v in plan.variants))


def test_a_plan_that_must_hold_when_engines_are_slower_costs_what_the_other_says() -> None:
    wish = a_wish(
        model="mistral-small-3.2", demand=Demand(requests_per_s=1.0),
        slo=Objective(tpot_p95_ms=50), replicas=ReplicaBounds(max=16), tensor_parallel_size=1,
        max_model_len=16384,
    )  # fmt: skip
    full = 2.99 * the_only(plan_for(wish)).capacity_requests_per_s
    wish = wish.model_copy(update={"demand": Demand(requests_per_s=full)})

    rosy = plan_for(wish, pools=[a_pool(nodes=2)])
    careful = plan_for(wish, pools=[a_pool(nodes=2)], robust="require")

    assert rosy.robustness is not None
    assert rosy.robustness.short == ("chat",)
    assert rosy.robustness.objective_to_hold == pytest.approx(careful.cost_per_hour)
    assert careful.cost_per_hour > rosy.cost_per_hour
