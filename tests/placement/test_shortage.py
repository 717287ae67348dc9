"""What a fleet lacks that does not fit: the way out that is told does let it fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from placement.explain import explain
from placement.fleet import Demand, FleetModel, FleetSpec, Objective, ReplicaBounds, TokenLengths
from placement.inventory import Inventory, Pool
from placement.plan import Plan
from placement.planner import make_plan
from tests.placement.builders import CATALOGUE, a_fleet, a_pool, a_wish, an_inventory

NOTHING_ELSE = re.compile(
    r"^(replicas\.max: (?P<max>\d+)|a slo of (?P<slo>.+?)(?=$|, or)|"
    r"(?P<gpus>\d+) more GPUs in pool (?P<pool>\S+), (?P<each>\d+) to a node|"
    r"max_spot_share: (?P<share>[\d.]+)|max_model_len: (?P<context>\d+)|"
    r"GPUs with (?P<gib>[\d.]+) GiB)"
)


def a_chat(rate: float, **changes: Any) -> FleetModel:
    fields: dict[str, Any] = {
        "model": "mistral-7b",
        "max_model_len": 8192,
        "demand": Demand(requests_per_s=rate),
        "replicas": ReplicaBounds(min=1, max=40),
    }
    return a_wish(**{**fields, **changes})


def planned(*wishes: FleetModel, pools: tuple[Pool, ...], **changes: Any) -> Plan:
    return make_plan(a_fleet(*wishes, **changes), an_inventory(*pools), CATALOGUE)


def with_all_ways_out(fleet: FleetSpec, inventory: Inventory, plan: Plan) -> Plan:
    """The plan after all that `plan` says would help was done."""
    for entry in plan.unmet:
        for part in entry.cheapest_relaxation.split(", with "):
            found = NOTHING_ELSE.match(part)
            assert found is not None, part
            fleet, inventory = eased(fleet, inventory, entry.model, found.groupdict())
    return make_plan(fleet, inventory, CATALOGUE)


def eased(
    fleet: FleetSpec, inventory: Inventory, model: str, told: dict[str, str | None]
) -> tuple[FleetSpec, Inventory]:
    wish = next(each for each in fleet.models if each.name == model)
    changes: dict[str, Any] = {}
    if told["max"] is not None:
        changes["replicas"] = wish.replicas.model_copy(update={"max": int(told["max"])})
    if told["slo"] is not None:
        pairs = (pair.split() for pair in told["slo"].split(" and "))
        changes["slo"] = Objective(**{name: float(value) for name, value in pairs})
    if told["context"] is not None:
        changes["max_model_len"] = int(told["context"])
    models = tuple(
        each.model_copy(update=changes) if each.name == model else each for each in fleet.models
    )
    fleet = fleet.model_copy(update={"models": models})
    if told["share"] is not None:
        fleet = fleet.model_copy(update={"max_spot_share": float(told["share"])})
    pools = tuple(eased_pool(pool, told) for pool in inventory.pools)
    return fleet, inventory.model_copy(update={"pools": pools})


def eased_pool(pool: Pool, told: dict[str, str | None]) -> Pool:
    changes: dict[str, Any] = {}
    if told["gib"] is not None:
        changes["memory_gib_per_gpu"] = float(told["gib"])
    if pool.name == told["pool"]:
        each = int(told["each"] or 1)
        places = int(told["gpus"] or 0) // each
        changes["nodes"] = pool.nodes - (-places // (pool.gpus_per_node // each))
    return pool.model_copy(update=changes)


STRICT = Objective(ttft_p95_s=0.02, tpot_p95_ms=5)
LONG = Demand(requests_per_s=3, input_tokens=TokenLengths(mean=800, p95=4000))


@pytest.mark.parametrize(
    ("wishes", "pools", "changes"),
    [
        pytest.param([a_chat(3, slo=STRICT)], [a_pool()], {}, id="too slow"),
        pytest.param(
            [a_chat(3, slo=Objective(ttft_p95_s=0.05), demand=LONG)],
            [a_pool("l4", "L4")],
            {},
            id="long prompts are too slow",
        ),
        pytest.param(
            [a_chat(60, slo=STRICT, replicas=ReplicaBounds(max=2))],
            [a_pool("l4", "L4")],
            {},
            id="too slow for many requests",
        ),
        pytest.param(
            [a_chat(3, slo=STRICT)], [a_pool()], {"robust": "require"}, id="too slow for certain"
        ),
        pytest.param(
            [a_chat(300, replicas=ReplicaBounds(max=2), tensor_parallel_size=1)],
            [a_pool("l4", "L4")],
            {},
            id="the limit of replicas, and then the GPUs",
        ),
        pytest.param(
            [a_chat(200, tensor_parallel_size=4), a_chat(200, name="b", tensor_parallel_size=4)],
            [a_pool("l4", "L4")],
            {},
            id="two models that lack the same GPUs",
        ),
        pytest.param(
            [a_chat(80)], [a_pool("l4", "L4", spot=True)], {"max_spot_share": 0.0}, id="only spot"
        ),
        pytest.param(
            [a_chat(1, model="mistral-small-3.2", precision=("bf16",))],
            [a_pool("l4", "L4", gpus_per_node=1)],
            {},
            id="too little memory",
        ),
    ],
)
def test_the_ways_out_together_let_the_fleet_fit(
    wishes: list[FleetModel], pools: list[Pool], changes: dict[str, Any]
) -> None:
    plan = planned(*wishes, pools=tuple(pools), **changes)
    assert plan.unmet

    better = with_all_ways_out(a_fleet(*wishes, **changes), an_inventory(*pools), plan)

    assert not better.unmet


def test_a_limit_that_is_reached_with_small_replicas_is_not_told_to_be_lowered() -> None:
    """Large replicas would do with fewer, but have no room."""
    small, large = a_pool("l4", "L4", nodes=8, gpus_per_node=1), a_pool(gpus_per_node=1)
    wish = a_chat(60, replicas=ReplicaBounds(max=3))

    plan = planned(wish, a_chat(50, name="b", pools=("h100",)), pools=(small, large))

    for entry in plan.unmet:
        limit = re.match(r"replicas\.max: (\d+)", entry.cheapest_relaxation)
        assert limit is None or int(limit[1]) > 3


def test_what_each_model_lacks_is_a_way_out_together() -> None:
    """Nothing alone helps: one has no such checkpoint, another too few GPUs, a third is too slow."""
    wishes = (
        a_chat(1, name="a", precision=("nvfp4",)),
        a_chat(60, name="b", tensor_parallel_size=1),
        a_chat(1, name="c", slo=STRICT),
    )
    fleet, inventory = a_fleet(*wishes), an_inventory(a_pool("l4", "L4", gpus_per_node=2))
    plan = make_plan(fleet, inventory, CATALOGUE)

    (way,) = explain(fleet, inventory, CATALOGUE, plan).ways_out

    assert "precision any of a" in way.change
    assert "of c" in way.change
    assert "in pool l4" in way.change


def test_a_price_that_nobody_knows_is_told_and_does_not_depend_on_other_pools() -> None:
    wish = a_chat(1, pools=("l4",))
    alone = planned(wish, pools=(a_pool("l4", "L4"),))
    beside = planned(wish, pools=(a_pool("l4", "L4"), a_pool("h100")))

    assert alone.unpriced == beside.unpriced == ("l4",)
    assert 0 < alone.cost_per_hour == beside.cost_per_hour
    assert not planned(wish, pools=(a_pool("l4", "L4", price_per_gpu_hour=0.7),)).unpriced
