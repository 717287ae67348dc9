"""What holds of every plan, whatever fleet and inventory."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.fleet import Demand, FleetModel, Objective, ReplicaBounds
from placement.inventory import Pool
from placement.milp import Limits
from placement.plan import Plan
from placement.planner import make_plan
from tests.placement.builders import CATALOGUE, a_fleet, a_pool, a_wish, an_inventory

MODELS = ("mistral-7b", "mistral-small-3.2", "mixtral-8x7b", "ministral-3-8b")
GPUS = ("H100-SXM", "A100-80-SXM", "RTX-4090", "L40S")
SLOWLY = settings(deadline=None, max_examples=40)


@st.composite
def wishes(draw: st.DrawFn) -> list[FleetModel]:
    return [
        a_wish(
            f"m{index}",
            draw(st.sampled_from(MODELS)),
            max_model_len=8192,
            demand=Demand(requests_per_s=draw(st.sampled_from([0.0, 0.5, 3.0, 11.0, 40.0]))),
            slo=Objective(tpot_p95_ms=draw(st.sampled_from([None, 30.0, 80.0]))),
            replicas=ReplicaBounds(min=draw(st.integers(0, 2)), max=8),
        )
        for index in range(draw(st.integers(1, 3)))
    ]


@st.composite
def pools(draw: st.DrawFn) -> list[Pool]:
    return [
        a_pool(
            f"p{index}",
            draw(st.sampled_from(GPUS)),
            nodes=draw(st.integers(1, 2)),
            gpus_per_node=draw(st.sampled_from([1, 2, 3, 4, 8])),
        )
        for index in range(draw(st.integers(1, 3)))
    ]


Kind = Literal["cost", "throughput", "headroom"]


def planned(models: list[FleetModel], there: list[Pool], objective: Kind = "cost") -> Plan:
    fleet = a_fleet(*models, objective=objective, robust="off")
    return make_plan(fleet, an_inventory(*there), CATALOGUE, limits=Limits(gap=0.0))


def larger(pool: Pool, nodes: int) -> Pool:
    return pool.model_copy(update={"nodes": pool.nodes + nodes})


@SLOWLY
@given(
    models=wishes(), there=pools(), objective=st.sampled_from(["cost", "throughput", "headroom"])
)
def test_one_more_node_never_makes_the_objective_worse(
    models: list[FleetModel], there: list[Pool], objective: Kind
) -> None:
    before = planned(models, there, objective)
    after = planned(models, [larger(there[0], 1), *there[1:]], objective)

    if not before.unmet:
        assert not after.unmet
        assert after.objective <= before.objective + 1e-5 * abs(before.objective) + 1e-9


@SLOWLY
@given(models=wishes(), there=pools())
def test_one_more_gpu_of_its_own_never_makes_the_objective_worse(
    models: list[FleetModel], there: list[Pool]
) -> None:
    before = planned(models, there)
    after = planned(models, [*there, a_pool("extra", "H100-SXM", gpus_per_node=1)])

    assert len(after.unmet) <= len(before.unmet)
    if not before.unmet:
        assert after.objective <= before.objective * (1 + 1e-5) + 1e-9


@SLOWLY
@given(models=wishes(), there=pools(), share=st.sampled_from([0.0, 0.3, 0.9]))
def test_less_demand_never_costs_more(
    models: list[FleetModel], there: list[Pool], share: float
) -> None:
    first = models[0]
    assert first.demand is not None
    less = first.demand.model_copy(update={"requests_per_s": first.demand.requests_per_s * share})
    before = planned(models, there)
    after = planned([first.model_copy(update={"demand": less}), *models[1:]], there)

    if not before.unmet:
        assert not after.unmet
        assert after.cost_per_hour <= before.cost_per_hour * (1 + 1e-5) + 1e-9


@SLOWLY
@given(models=wishes(), there=pools())
def test_a_plan_carries_every_demand_or_says_so(
    models: list[FleetModel], there: list[Pool]
) -> None:
    plan = planned(models, there)
    short = {entry.model for entry in plan.unmet}

    for model in models:
        mine = [variant for variant in plan.variants if variant.model == model.name]
        carried = sum(v.replicas * v.capacity_requests_per_s for v in mine)
        assert model.demand is not None
        assert model.name in short or carried >= model.demand.requests_per_s * (1 - 1e-5)
        if len(mine) > 1:
            assert sum(v.bounds.max for v in mine) == model.replicas.max
            assert sum(v.bounds.min for v in mine) == model.replicas.min
    assert sum(v.price_per_hour for v in plan.variants) == pytest.approx(plan.cost_per_hour)


@SLOWLY
@given(models=wishes(), there=pools())
def test_planning_again_from_the_plan_itself_moves_nothing(
    models: list[FleetModel], there: list[Pool]
) -> None:
    fleet, inventory = a_fleet(*models), an_inventory(*there)
    plan = make_plan(fleet, inventory, CATALOGUE)
    again = make_plan(fleet, inventory, CATALOGUE, running=plan)

    if not plan.unmet:
        assert {v.variant: v.placement for v in again.variants if v.replicas} == {
            v.variant: v.placement for v in plan.variants if v.replicas
        }
