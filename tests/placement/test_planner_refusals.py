"""What a plan says of that which it cannot have."""

from __future__ import annotations

import re

import pytest

from placement.catalogue import Checkpoint
from placement.errors import UnknownName
from placement.fleet import Demand, Objective, ReplicaBounds
from tests.placement.builders import (
    a_catalogue,
    a_model,
    a_pool,
    a_wish,
)
from tests.placement.plans import plan_for


def test_a_demand_beyond_the_replica_limit_is_said_with_the_way_out() -> None:
    wish = a_wish(
        model="mistral-small-3.2",
        demand=Demand(requests_per_s=500.0),
        tensor_parallel_size=1,
        replicas=ReplicaBounds(min=1, max=2),
    )

    plan = plan_for(wish)

    assert plan.status == "infeasible"
    assert "replicas.max is 2" in plan.unmet[0].constraint
    assert re.fullmatch(
        r"replicas.max: (\d+), with \d+ more GPUs in pool h100, 1 to a node",
        plan.unmet[0].cheapest_relaxation,
    )
    assert plan.variants[0].replicas == 2


def test_a_service_level_that_nothing_reaches_is_said_with_what_would_be_reached() -> None:
    plan = plan_for(a_wish(model="mistral-7b", slo=Objective(tpot_p95_ms=0.1)))

    assert plan.status == "infeasible"
    assert "tpot_p95_ms 0.1" in plan.unmet[0].constraint
    assert "tpot_p95_ms" in plan.unmet[0].cheapest_relaxation


def test_a_model_that_fits_nowhere_names_the_closest_shape_and_what_it_lacks() -> None:
    wish = a_wish(model="mistral-large-3", precision=("bf16", "fp8", "nvfp4"))

    plan = plan_for(wish, pools=[a_pool("rtx4090", "RTX-4090")])

    (unmet,) = plan.unmet
    assert plan.variants == ()
    assert unmet.constraint.startswith("weights-exceed-memory: nvfp4 on 8 x RTX-4090:")
    assert unmet.cheapest_relaxation.startswith("GPUs with ")
    assert {entry.rule for entry in plan.rejected} == {"weights-exceed-memory"}


def test_full_nodes_are_said_with_the_gpus_that_lack() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(min=3, max=3), tensor_parallel_size=1)

    plan = plan_for(wish, pools=[a_pool(gpus_per_node=2)])

    assert plan.status == "infeasible"
    assert "room for 2 replicas" in plan.unmet[0].constraint
    assert plan.unmet[0].cheapest_relaxation.startswith("1 more GPUs in pool h100")
    assert plan.variants[0].replicas == 2


def test_a_precision_without_checkpoint_is_said() -> None:
    plan = plan_for(a_wish(model="mixtral-8x22b-base", precision=("fp8",)))

    assert plan.status == "infeasible"
    assert plan.unmet[0].constraint == (
        "no-such-checkpoint: mixtral-8x22b-v0.1 has no fp8 checkpoint, only awq, bf16, iq1_s, q4_k_m"
    )


def test_a_replica_that_needs_more_than_a_node_is_rejected() -> None:
    plan = plan_for(a_wish(model="mistral-7b", precision=("bf16",), tensor_parallel_size=16))

    assert {entry.rule for entry in plan.rejected} == {"tensor-parallel-exceeds-node"}


def test_unknown_pools_and_models_are_named_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'h100'"):
        plan_for(a_wish(model="mistral-7b", pools=("h10",)))
    with pytest.raises(UnknownName, match=r"mistral-7b-v0\.3"):
        plan_for(a_wish(model="mistral-7b-v0.5"))


def test_a_demand_that_only_spot_nodes_could_carry_says_so() -> None:
    wish = a_wish(model="mistral-7b", demand=Demand(requests_per_s=5.0))

    plan = plan_for(wish, pools=[a_pool(spot=True)], max_spot_share=0.5)

    (unmet,) = plan.unmet
    assert "2.5 requests/s must not depend on spot nodes" in unmet.constraint
    assert unmet.cheapest_relaxation.startswith("max_spot_share: 1")


def test_a_shape_that_another_can_always_replace_is_told_as_dominated() -> None:
    plan = plan_for(a_wish(model="mistral-small-3.2", precision=("bf16", "fp8")))

    dominated = [entry for entry in plan.rejected if entry.rule == "dominated"]
    assert any("carries" in entry.reason for entry in dominated)


def test_a_gguf_checkpoint_is_rejected_once() -> None:
    gguf = Checkpoint(precision="q4_k_m", format="gguf", source="x")
    model = a_model(checkpoints=(gguf,))

    plan = plan_for(a_wish(), catalogue=a_catalogue(model))

    assert [entry.rule for entry in plan.rejected] == ["engine-has-no-loader"]
