"""Experts that are balanced over ranks: when, with which flags, and what it costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from placement.balancing import balance_bytes, with_balance
from placement.candidate import Candidate
from placement.catalogue import Checkpoint, load_catalogue
from placement.engine_args import engine_args
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.legality import first_rejection
from placement.memory import memory_use, stages_of
from placement.notes import shape_notes
from placement.plan import Plan
from placement.planner import make_plan
from placement.serving_features import ExpertBalance
from tests.placement.builders import a_cpu_device, a_gpu_device, a_model

CATALOGUE = load_catalogue()
SPREAD = {"tensor_parallel_size": 4, "expert_parallel": True}


def a_candidate(name: str = "nano-mixtral", **changes: Any) -> Candidate:
    model = CATALOGUE.model(name)
    fields = {"model": model, "checkpoint": model.checkpoints[0], "device": a_gpu_device()}
    return with_balance(Candidate(**{**fields, "eplb": ExpertBalance(), **SPREAD, **changes}))


def a_plan_with(eplb: ExpertBalance | None, **changes: Any) -> Plan:
    fields = {"name": "large", "model": "mixtral-8x7b", "tensor_parallel_size": 4, "eplb": eplb}
    fleet = FleetSpec(fleet="t", models=(FleetModel(**{**fields, **changes}),))
    pool = Pool(name="h100", gpu="H100-SXM", gpus_per_node=8)
    return make_plan(fleet, Inventory(pools=(pool,)), CATALOGUE)


def config_in(args: tuple[str, ...]) -> Any:
    return json.loads(args[args.index("--eplb-config") + 1])


def test_a_plan_switches_balancing_on_with_what_the_fleet_says() -> None:
    wish = ExpertBalance(window_size=500, step_interval=1500, num_redundant_experts=4)

    [variant] = a_plan_with(wish).variants

    assert "--enable-eplb" in variant.shape.engine_args
    assert config_in(variant.shape.engine_args) == {
        "num_redundant_experts": 4,
        "window_size": 500,
        "step_interval": 1500,
        "log_balancedness": True,
        "log_balancedness_interval": 100,
    }


def test_nothing_is_measured_where_that_is_not_wanted() -> None:
    args = engine_args(a_candidate(eplb=ExpertBalance(log_interval=0)))

    assert config_in(args) == {"window_size": 1000, "step_interval": 3000}


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_parallel_size": 1},
        {"expert_parallel": False},
        {"device": a_cpu_device()},
        {"checkpoint": Checkpoint(precision="awq", source="x")},
    ],
)
def test_where_it_is_not_possible_it_is_left_out_and_said(changes: dict[str, Any]) -> None:
    candidate = a_candidate(**changes)

    assert not candidate.enable_eplb
    assert not [arg for arg in engine_args(candidate) if "eplb" in arg]
    assert [note for note in shape_notes(candidate) if "not balanced" in note]


def test_a_dense_model_has_nothing_to_balance() -> None:
    rejection = first_rejection(
        Candidate(
            model=a_model(),
            checkpoint=a_model().checkpoints[0],
            device=a_gpu_device(),
            eplb=ExpertBalance(),
        )
    )

    assert rejection is not None
    assert rejection.rule == "eplb-cannot-move-experts"
    assert "leave eplb out" in rejection.reason


def test_copies_that_do_not_spread_evenly_are_refused_with_the_numbers() -> None:
    plan = a_plan_with(ExpertBalance(num_redundant_experts=3))

    assert plan.status == "infeasible"
    [reason] = [each.reason for each in plan.rejected if each.rule == "eplb-needs-even-experts"]
    assert "11 experts evenly over 4 ranks" in reason


def test_copies_and_the_layer_that_comes_and_the_counters_take_memory() -> None:
    plain = a_candidate(eplb=None)
    few = a_candidate(eplb=ExpertBalance(window_size=10))
    more = a_candidate(eplb=ExpertBalance(window_size=10, num_redundant_experts=4))
    expert = 3 * 256 * 512 * 2  # bytes
    layers, ranks = 4, 4

    assert balance_bytes(plain, stages_of(plain)[0]) == 0
    assert balance_bytes(few, stages_of(few)[0]) == 8 // ranks * expert + 10 * layers * 16 * 4
    assert balance_bytes(more, stages_of(more)[0]) == 12 // ranks * expert + 10 * layers * 20 * 4
    weights = [memory_use(each).per_gpu.weights_bytes for each in (few, more)]
    assert weights[1] - weights[0] == layers * expert


def test_the_kv_cache_gives_way() -> None:
    plain, balanced = (memory_use(each).per_gpu for each in (a_candidate(eplb=None), a_candidate()))
    taken = balance_bytes(a_candidate(), stages_of(a_candidate())[0])

    assert plain.kv_cache_bytes - balanced.kv_cache_bytes == taken


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eplb": {"window_size": 0}}, "greater than 0"),
        ({"eplb": {"num_redundant_experts": 2000}}, "less than or equal to 1023"),
        ({"engine_args": ("--enable-eplb",)}, "use eplb"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        FleetModel(**{"name": "large", "model": "mixtral-8x7b", **changes})
