"""llama.cpp in fleets: which GGUF files on how many GPUs, and whose host memory."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from placement.catalogue import load_catalogue
from placement.changes import migration
from placement.explain import explain
from placement.fit_checkpoints import Case, Subject, weights_to_try
from placement.fit_llamacpp import PlacedShape, placed_shapes
from placement.fit_request import FitRequest
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.llamacpp_speed import llamacpp_replica_speed, predict_llamacpp
from placement.loading import load_bytes
from placement.migration import Replace
from placement.performance import Load, predict
from placement.plan import Plan, Robustness
from placement.planner import make_plan

CATALOGUE = load_catalogue()
GIB = 2**30
LARGE_3 = "mistral-large-3-675b-2512"
SMALL = "mistral-small-3.2-24b-2506"


def a_model(name: str = "chat", model: str = SMALL, **changes: Any) -> FleetModel:
    return FleetModel(**{"name": name, "model": model, "engine": "llamacpp", **changes})


def an_inventory(**pool: Any) -> Inventory:
    fields = {"name": "p", "gpu": "RTX-4090", "gpus_per_node": 4, "host_memory_gib": 512, **pool}
    return Inventory(pools=(Pool(**fields),))


def a_fleet(*models: FleetModel, **changes: Any) -> FleetSpec:
    return FleetSpec(fleet="test", models=models, **changes)


def planned(*models: FleetModel, **pool: Any) -> Plan:
    return make_plan(a_fleet(*models), an_inventory(**pool), CATALOGUE)


def flag(plan: Plan, name: str, model: int = 0) -> str:
    arguments = plan.variants[model].shape.engine_args
    return arguments[arguments.index(name) + 1]


def test_a_precision_chooses_the_gguf_file() -> None:
    plan = planned(a_model(precision=("q4_k_m",), max_model_len=8192))

    [variant] = plan.variants
    assert (variant.shape.engine, variant.shape.precision) == ("llamacpp", "q4_k_m")
    assert variant.checkpoint_format == "gguf"
    assert variant.variant == "chat@p-gguf-q4_k_m-pp1"
    assert flag(plan, "--n-gpu-layers") == str(variant.shape.num_layers + 1)


def test_more_bits_are_preferred_where_they_cost_no_more_gpus() -> None:
    [variant] = planned(a_model(max_model_len=8192)).variants

    assert variant.shape.precision in ("q6_k", "q6_k_l", "q5_k_m")
    assert variant.gpus_per_replica == 1


def test_experts_stay_in_host_memory_and_take_their_share_of_the_nodes_gpus() -> None:
    plan = planned(a_model(model=LARGE_3, precision=("q4_k_m",), max_model_len=8192))

    [variant] = plan.variants
    assert int(flag(plan, "--n-cpu-moe")) > 50
    assert variant.shape.host_memory_bytes > 300 * GIB
    assert variant.gpus_per_replica == 3  # of 4, since 350 GiB are three quarters of 512


def test_two_replicas_do_not_share_host_memory_that_only_one_has() -> None:
    model = a_model(model=LARGE_3, precision=("q4_k_m",), max_model_len=8192)
    plan = planned(model.model_copy(update={"replicas": model.replicas.model_copy(
        update={"min": 2, "max": 2})}))  # fmt: skip

    assert plan.status == "infeasible"


def test_too_little_host_memory_is_refused_with_the_numbers() -> None:
    plan = planned(a_model(model=LARGE_3, precision=("q4_k_m",)), host_memory_gib=64)

    [unmet] = plan.unmet
    assert "pages-from-disk" in unmet.constraint
    assert "64 GiB are there" in unmet.constraint
    assert "host memory" in unmet.cheapest_relaxation


def test_unknown_host_memory_gives_an_offloaded_replica_the_whole_node() -> None:
    plan = planned(
        a_model(model=LARGE_3, precision=("q4_k_m",), max_model_len=8192), host_memory_gib=None
    )

    assert plan.variants[0].gpus_per_replica == 4


def test_slots_of_a_cpu_bring_their_memory_and_the_cache_keeps_to_its_budget() -> None:
    plan = planned(
        a_model(model="mistral-7b-v0.3", precision=("q8_0",)),
        gpu="cpu", memory_gib_per_gpu=5, kv_cache_gib_per_gpu=1, host_memory_gib=20,
    )  # fmt: skip

    [variant] = plan.variants
    assert variant.gpus_per_replica == 2  # 7.7 GB of weights
    assert variant.shape.kv_cache_tokens == GIB // (32 * 2 * 8 * 128 * 2)
    assert variant.shape.per_gpu.weights_bytes == pytest.approx(7.7e9, rel=0.02)


def test_a_context_beyond_the_budget_is_refused() -> None:
    plan = planned(
        a_model(model="mistral-7b-v0.3", precision=("q8_0",), max_model_len=32768),
        gpu="cpu", memory_gib_per_gpu=5, kv_cache_gib_per_gpu=1, host_memory_gib=20,
    )  # fmt: skip

    assert "kv-cache-below-one-request" in plan.unmet[0].constraint


def test_a_model_without_gguf_files_says_how_to_get_one() -> None:
    plan = planned(a_model(model="nano-small"))

    assert "convert_hf_to_gguf.py" in plan.unmet[0].constraint
    assert "engine: vllm" in plan.unmet[0].cheapest_relaxation


def test_demand_is_met_by_replicas() -> None:
    demand = {"requests_per_s": 2.0}
    plan = planned(
        a_model(precision=("q4_k_m",), demand=demand, replicas={"max": 4}, max_model_len=8192)
    )

    [variant] = plan.variants
    assert variant.replicas > 1
    assert variant.replicas * variant.capacity_requests_per_s >= 2.0
    assert 0 < variant.predicted.utilization <= 1


def test_the_fleets_flags_come_last() -> None:
    plan = planned(a_model(engine_args=("--cache-ram", "4096")))

    assert plan.variants[0].shape.engine_args[-2:] == ("--cache-ram", "4096")


@pytest.mark.parametrize(
    ("key", "value"),
    [("tensor_parallel_size", 2), ("expert_parallel", True), ("dtype", "float32")],
)
def test_keys_that_llama_cpp_does_not_know_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"{key}: {value} means nothing to engine"):
        a_model(**{key: value})


def test_a_pool_is_shared_with_vllm() -> None:
    other = FleetModel(name="small", model="ministral-3-8b", max_model_len=8192)
    plan = planned(a_model(precision=("q4_k_m",), max_model_len=8192), other)

    assert plan.status == "optimal"
    assert sorted(variant.shape.engine for variant in plan.variants) == ["llamacpp", "vllm"]


def test_what_runs_stays_though_a_faster_file_is_there() -> None:
    fleet, pools = a_fleet(a_model(max_model_len=8192)), an_inventory()
    running = make_plan(fleet, pools, CATALOGUE)

    again = make_plan(fleet, pools, CATALOGUE, running=running)

    assert again.variants == running.variants
    assert migration(running, again).changes == ()


def test_another_quantisation_of_the_same_repository_is_another_engine() -> None:
    before = planned(a_model(precision=("q4_k_m",), max_model_len=8192))
    fleet = a_fleet(a_model(precision=("q6_k",), max_model_len=8192))
    after = make_plan(fleet, an_inventory(), CATALOGUE, running=before)

    assert before.variants[0].checkpoint == after.variants[0].checkpoint
    moved = migration(before, after)
    assert [change.kind for change in moved.changes] == ["create", "delete"]
    assert moved.bytes_to_load == pytest.approx(19.35e9, rel=0.05)


def test_another_context_is_told_as_the_reason_of_a_replacement() -> None:
    before = planned(a_model(precision=("q4_k_m",), max_model_len=8192))
    fleet = a_fleet(a_model(precision=("q4_k_m",), max_model_len=4096))
    after = make_plan(fleet, an_inventory(), CATALOGUE, running=before)

    [change] = migration(before, after).changes
    assert isinstance(change, Replace)
    assert change.why == "max_model_len 8192 -> 4096"


def test_weights_in_host_memory_are_loaded_too() -> None:
    plan = planned(a_model(model=LARGE_3, precision=("q4_k_m",), max_model_len=8192))

    assert load_bytes(plan.variants[0]) == pytest.approx(405e9, rel=0.1)


def test_reasons_name_the_file_and_the_runner_up() -> None:
    other = Pool(name="q", gpu="L40S", gpus_per_node=1, host_memory_gib=64)
    pools = Inventory(pools=(*an_inventory().pools, other))
    fleet = a_fleet(a_model(precision=("q4_k_m",), max_model_len=8192))
    plan = make_plan(fleet, pools, CATALOGUE)

    [reason] = explain(fleet, pools, CATALOGUE, plan).reasons
    assert reason.chosen[0].startswith("1 x q4_k_m on 1 x RTX-4090")
    assert "1 x L40S (gguf-q4_k_m-pp1, pool q)" in (reason.runner_up or "")


def test_flags_that_leave_room_hold_with_less_memory() -> None:
    assert planned(a_model(max_model_len=8192)).robustness == Robustness(holds=True)


def test_flags_that_fill_a_gpu_do_not_hold_with_less_memory() -> None:
    full = a_model(precision=("q4_k_m",), gpu_memory_utilization=1.0)
    pools = an_inventory(gpus_per_node=1)

    preferred = make_plan(a_fleet(full), pools, CATALOGUE)
    required = make_plan(a_fleet(full, robust="require"), pools, CATALOGUE)

    assert preferred.robustness is not None
    assert preferred.robustness.short == ("chat",)
    assert "no room for 5 % less memory" in required.unmet[0].constraint
    assert "gpu_memory_utilization: 0.95" in required.unmet[0].cheapest_relaxation


def test_slower_engines_need_more_replicas_where_the_plan_must_hold() -> None:
    demand = {"requests_per_s": 2.0}
    model = a_model(precision=("q4_k_m",), demand=demand, replicas={"max": 8}, max_model_len=8192)
    pools = an_inventory(nodes=2)

    plain = make_plan(a_fleet(model, robust="off"), pools, CATALOGUE).variants[0]
    held = make_plan(a_fleet(model, robust="require"), pools, CATALOGUE).variants[0]

    assert held.capacity_requests_per_s == pytest.approx(0.85 * plain.capacity_requests_per_s)
    assert held.replicas >= plain.replicas


@pytest.mark.parametrize(
    ("model", "gpu", "num_gpus"),
    [(SMALL, "RTX-4090", 1), (SMALL, "H100-SXM", 2), (LARGE_3, "RTX-4090", 4), (SMALL, "cpu", 1)],
)
def test_planner_and_fit_predict_the_same_speed(model: str, gpu: str, num_gpus: int) -> None:
    request = FitRequest(
        gpu=gpu, num_gpus=num_gpus, engine="llamacpp", max_model_len=8192, host_memory_gib=600,
        input_tokens=512, output_tokens=128,
    )  # fmt: skip
    subject, kind = Subject(CATALOGUE.model(model), None), CATALOGUE.gpu(gpu)
    [weights] = [w for w in weights_to_try(subject, request) if w.precision == "q4_k_m"][:1]
    placed = list(placed_shapes(Case(subject, weights, request, kind)))[-1]
    assert isinstance(placed, PlacedShape)
    speed = llamacpp_replica_speed(placed.task, placed.placement, kind, max_num_batched_tokens=2048)

    for slots, tolerance in ((1, 1e-3), (4, 0.15)):
        asked = request.model_copy(update={"concurrency": slots})
        told = predict_llamacpp(placed.task, placed.placement, kind, asked)
        found = predict(speed, Load(concurrency=slots, input_tokens=512, output_tokens=128))
        assert found.tpot_ms == pytest.approx(told.tpot_ms, rel=tolerance)
        assert found.output_tokens_per_s == pytest.approx(told.output_tokens_per_s, rel=0.15)
        assert found.tpot_error == told.tpot_error
