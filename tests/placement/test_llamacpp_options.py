"""llama.cpp in fleets: which GGUF files on how many GPUs, and whose host memory."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.plan import Plan
from placement.planner import make_plan

CATALOGUE = load_catalogue()
GIB = 2**30
LARGE_3 = "mistral-large-3-675b-2512"
SMALL = "mistral-small-3.2-24b-2506"


def a_model(name: str = "chat", model: str = SMALL, **changes: Any) -> FleetModel:
    return FleetModel(**{"name": name, "model": model, "engine": "llamacpp", **changes})


def planned(*models: FleetModel, **pool: Any) -> Plan:
    fields = {"name": "p", "gpu": "RTX-4090", "gpus_per_node": 4, "host_memory_gib": 512, **pool}
    fleet = FleetSpec(fleet="test", models=models)
    return make_plan(fleet, Inventory(pools=(Pool(**fields),)), CATALOGUE)


def flag(plan: Plan, name: str, model: int = 0) -> str:
    arguments = plan.variants[model].shape.engine_args
    return arguments[arguments.index(name) + 1]


def test_a_precision_chooses_the_gguf_file() -> None:
    plan = planned(a_model(precision=("q4_k_m",), max_model_len=8192))

    [variant] = plan.variants
    assert (variant.shape.engine, variant.shape.precision) == ("llamacpp", "q4_k_m")
    assert variant.checkpoint_format == "gguf"
    assert variant.variant == "chat@p-gguf-q4_k_m"
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
