from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.fleet import Demand, FleetModel, ReplicaBounds
from placement.inventory import Pool
from placement.node_loss import losses
from placement.plan import NodeLoss, Plan
from placement.planner import make_plan
from tests.placement.builders import CATALOGUE, a_fleet, a_pool, a_wish, an_inventory


def a_chat(requests_per_s: float = 25.0, most: int = 16, **changes: Any) -> FleetModel:
    fields: dict[str, Any] = {
        "model": "mistral-7b",
        "max_model_len": 8192,
        "demand": Demand(requests_per_s=requests_per_s),
        "replicas": ReplicaBounds(min=1, max=most),
    }
    return a_wish(**{**fields, **changes})


def planned(*wishes: FleetModel, pools: tuple[Pool, ...], **changes: Any) -> Plan:
    return make_plan(a_fleet(*wishes, **changes), an_inventory(*pools), CATALOGUE)


def told(plan: Plan) -> NodeLoss:
    assert plan.node_loss is not None
    return plan.node_loss


def pool(**changes: Any) -> Pool:
    return a_pool(
        "l4", "L4", **{"nodes": 6, "gpus_per_node": 2, "price_per_gpu_hour": 0.8, **changes}
    )


def test_a_plan_says_what_the_loss_of_a_node_leaves() -> None:
    loss = told(planned(a_chat(0.1), pools=(pool(),)))

    assert not loss.carried
    assert loss.share == 0.0
    assert loss.restarts
    assert loss.restart_s is not None
    assert loss.restart_s > 60
    assert loss.in_words.startswith(
        f"survives the loss of any one node: no, without {loss.node}, chat carries 0 % of its "
        "demand, until its replicas run again on free GPUs, after"
    )


def test_without_free_gpus_nothing_starts_again() -> None:
    wish = a_chat(0.1, replicas=ReplicaBounds(min=4, max=4), tensor_parallel_size=1)

    loss = told(planned(wish, pools=(pool(nodes=2),)))

    assert loss.carried
    assert not loss.restarts
    assert loss.restart_s is None


def test_one_node_alone_is_not_told_about() -> None:
    assert planned(a_chat(0.1), pools=(pool(nodes=1),)).node_loss is None


def test_spare_nodes_take_the_replicas_of_a_lost_one() -> None:
    wish = a_chat(0.1, replicas=ReplicaBounds(min=8, max=8), tensor_parallel_size=1)

    full = told(planned(wish, pools=(pool(nodes=4),)))
    spared = told(planned(wish, pools=(pool(nodes=5),), spare_nodes=1))

    assert not full.restarts
    assert spared.restarts


def test_room_for_a_loss_costs_replicas_and_is_enough() -> None:
    lean = planned(a_chat(), pools=(pool(),))
    safe = planned(a_chat(), pools=(pool(),), carry_node_loss=True)

    assert not told(lean).carried
    assert told(safe).carried
    assert not safe.unmet
    assert safe.cost_per_hour > lean.cost_per_hour
    assert lean.cost_per_hour < safe.bound <= safe.objective  # what a loss takes is in the bound
    assert told(safe).in_words.startswith("survives the loss of any one node: yes, slowest case")


def test_a_replica_with_much_to_spare_gets_a_second_one_too() -> None:
    plan = planned(a_chat(0.1), pools=(pool(),), carry_node_loss=True)

    assert sum(variant.replicas for variant in plan.variants) == 2
    assert told(plan).carried


def test_replicas_over_two_nodes_are_doubled_on_other_nodes() -> None:
    few = a_pool("a100", "A100-40-SXM", nodes=2, gpus_per_node=2)
    rtx = a_pool("rtx", "RTX-4090", nodes=2, gpus_per_node=2)
    bounds = ReplicaBounds(min=1, max=4)
    wish = a_chat(0.5, model="mixtral-8x7b", max_model_len=16384, replicas=bounds)

    plan = planned(wish, pools=(few, rtx), carry_node_loss=True)

    assert told(plan).carried
    nodes = [{entry.node for entry in r} for v in plan.variants for r in v.placement]
    assert len(nodes) == 2
    assert not nodes[0] & nodes[1]


def test_a_model_without_a_demand_gets_a_second_replica() -> None:
    plan = planned(a_chat(demand=None), pools=(pool(),), carry_node_loss=True)

    assert sum(variant.replicas for variant in plan.variants) == 2
    assert told(plan).carried


def test_a_loss_that_cannot_be_carried_is_unmet_with_the_way_out() -> None:
    plan = planned(a_chat(0.1, most=1), pools=(pool(),), carry_node_loss=True)

    (unmet,) = plan.unmet
    assert unmet.constraint == "the loss of node l4-0 leaves 0 of 0.1 requests/s"
    assert "replicas.max above 1" in unmet.cheapest_relaxation
    assert plan.status == "infeasible"


def test_a_model_that_cannot_be_made_safe_does_not_keep_others_from_it() -> None:
    alone = a_chat(0.1, most=1, name="alone")

    plan = planned(alone, a_chat(), pools=(pool(),), carry_node_loss=True)

    assert [entry.model for entry in plan.unmet] == ["alone"]


@settings(deadline=None, max_examples=25)
@given(
    rates=st.lists(st.sampled_from([0.5, 5.0, 20.0, 45.0]), min_size=1, max_size=3),
    nodes=st.integers(2, 5),
    gpus=st.sampled_from([1, 2, 4]),
)
def test_what_says_that_it_carries_a_loss_does(rates: list[float], nodes: int, gpus: int) -> None:
    wishes = [a_chat(rate, name=f"m{n}") for n, rate in enumerate(rates)]
    there = (pool(nodes=nodes, gpus_per_node=gpus), a_pool("h100", nodes=2, gpus_per_node=1))

    plan = planned(*wishes, pools=there, carry_node_loss=True)

    demands = {wish.name: wish.demand.requests_per_s for wish in wishes if wish.demand}
    short = {lost.model for lost in losses(plan.variants, demands) if lost.share < 1 - 1e-5}
    assert short <= {entry.model for entry in plan.unmet}
    if not plan.unmet:
        assert told(plan).carried
        for node in {n.node for v in plan.variants for r in v.placement for n in r}:
            for model, rate in demands.items():
                left = sum(
                    variant.capacity_requests_per_s
                    for variant in plan.variants
                    if variant.model == model
                    for replica in variant.placement
                    if all(entry.node != node for entry in replica)
                )
                assert left >= rate * (1 - 1e-5)


def test_all_of_a_replica_is_lost_with_one_of_its_nodes() -> None:
    few = a_pool("a100", "A100-40-SXM", gpus_per_node=2)
    rtx = a_pool("rtx", "RTX-4090", gpus_per_node=2)
    wish = a_wish(model="mixtral-8x7b", max_model_len=16384, demand=Demand(requests_per_s=0.5))

    loss = told(planned(wish, pools=(few, rtx)))

    assert loss.share == pytest.approx(0.0)
    assert loss.restart_s is None


def test_two_replicas_are_apart_though_another_model_fills_the_nodes() -> None:
    many = a_chat(0.1, name="a", replicas=ReplicaBounds(min=10, max=10), tensor_parallel_size=1)
    few = a_chat(0.1, name="b", replicas=ReplicaBounds(min=2, max=2), tensor_parallel_size=1)

    plan = planned(many, few, pools=(pool(),))

    (variant,) = [each for each in plan.variants if each.model == "b"]
    assert len({replica[0].node for replica in variant.placement}) == 2


def test_a_loss_is_not_carried_by_more_replicas_on_the_only_node_of_a_pool() -> None:
    """The cheap pool has but one node: with less demand too, half must be elsewhere."""
    pools = (a_pool("cheap", "RTX-3090"), a_pool("h200", "H200-SXM", nodes=2, gpus_per_node=1))
    fields = {"model": "mistral-nemo-12b", "replicas": ReplicaBounds(min=2, max=4)}

    for rate in (9.0, 2.7, 0.0):
        plan = planned(a_chat(rate, **fields), pools=pools, carry_node_loss=True)

        assert not plan.unmet
        assert told(plan).carried
        assert {variant.pool for variant in plan.variants} == {"cheap", "h200"}
