"""Pipelines over several nodes, alike or not."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.candidate import Candidate
from placement.catalogue import Catalogue, ModelSpec
from placement.explain import explain
from placement.fleet import Demand, FleetModel, ReplicaBounds
from placement.inventory import Links, Pool
from placement.layer_split import slowest_s, split_layers
from placement.legality import first_rejection
from placement.memory import memory_use
from placement.option import carried
from placement.performance import Load, predict, replica_speed
from placement.plan import Plan, Variant
from placement.planner import make_plan
from placement.replica_speed import spanning_speed, speed_alone
from placement.spanning import Spanning, spanning_candidates
from placement.spec import dump_yaml, parse_yaml
from placement.stage_times import StageMemories, stage_times
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_catalogue,
    a_fleet,
    a_gpu_device,
    a_model,
    a_pool,
    a_wish,
    an_architecture,
    an_inventory,
)

NETWORK = Links(inter_gbps=100)
A100S = a_pool("a100", "A100-40-SXM", gpus_per_node=4, links=NETWORK)
RTX = a_pool("rtx", "RTX-4090", gpus_per_node=2, links=NETWORK)


def wide(num_layers: int = 8, **changes: Any) -> ModelSpec:
    """A model of about a GiB a layer."""
    architecture = an_architecture(
        num_layers=num_layers,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=40_000,
        vocab_size=32_768,
    )
    return a_model("wide", architecture, **changes)


def a_wide_wish(**changes: Any) -> FleetModel:
    fields: dict[str, Any] = {"max_model_len": 2048, "demand": Demand(requests_per_s=0.1)}
    return a_wish(model="wide", **{**fields, **changes})


def plan_of(wish: FleetModel, *pools: Pool, catalogue: Catalogue = CATALOGUE, **more: Any) -> Plan:
    return make_plan(a_fleet(wish), an_inventory(*pools), catalogue, **more)


def the_only(plan: Plan) -> Variant:
    assert plan.status == "optimal", plan.unmet
    (variant,) = plan.variants
    return variant


def pair(wish: FleetModel, model: ModelSpec, one: Pool, other: Pool) -> list[Spanning]:
    """On a node of each."""
    return list(spanning_candidates(wish, [(one, 1), (other, 1)], a_catalogue(model)).found)


def large() -> FleetModel:
    return a_wish(model="mixtral-8x7b", max_model_len=16384, demand=Demand(requests_per_s=0.5))


def test_a_model_that_no_node_holds_gets_stages_on_two_pools() -> None:
    few = A100S.model_copy(update={"gpus_per_node": 2})

    variant = the_only(plan_of(large(), few, RTX))

    assert variant.pools == ("a100", "rtx")
    assert variant.hardware == "2 x A100-40-SXM + 2 x RTX-4090"
    assert variant.variant == "chat@a100-and-rtx-tp2-pp2-2nodes-ep"
    first, second = variant.shape.layer_partition
    assert first + second == 32
    assert first > second  # more memory, and faster
    assert variant.shape.engine_environment == {"VLLM_PP_LAYER_PARTITION": f"{first},{second}"}
    assert [(node.node, node.gpus) for node in variant.placement[0]] == [
        ("a100-0", (0, 1)),
        ("rtx-0", (0, 1)),
    ]
    prices = [CATALOGUE.gpu(name).price_per_hour or 0.0 for name in ("A100-40-SXM", "RTX-4090")]
    assert variant.price_per_hour == pytest.approx(2 * sum(prices))


def test_nodes_that_give_unequal_numbers_of_gpus_have_entries_of_equal_size() -> None:
    wish = a_wide_wish(tensor_parallel_size=2)
    crowded = RTX.model_copy(update={"memory_gib_per_gpu": 12.0})
    small = A100S.model_copy(update={"memory_gib_per_gpu": 12.0})

    variant = the_only(plan_of(wish, small, crowded, catalogue=a_catalogue(wide(36))))

    assert variant.shape.pipeline_parallel_size == 3
    assert variant.shape.num_nodes == 3  # process trees of two ranks
    places = [(node.node, node.gpus) for node in variant.placement[0]]
    assert sorted(places) == [("a100-0", (0, 1)), ("a100-0", (2, 3)), ("rtx-0", (0, 1))]
    assert sum(variant.shape.layer_partition) == 36


def test_two_nodes_of_one_pool_hold_what_one_does_not() -> None:
    pool = a_pool("h100", nodes=4, links=Links(inter_gbps=400))
    wish = a_wish(model="mistral-large-3", precision=("fp8",))

    variant = the_only(plan_of(wish, pool))

    assert variant.pools == ("h100", "h100")
    assert variant.hardware == "8 x H100-SXM + 2 x H100-SXM"  # no more than it takes
    assert variant.shape.num_nodes == 5  # process trees of two ranks
    assert [node.node for node in variant.placement[0]] == [*["h100-0"] * 4, "h100-1"]


def test_never_means_that_a_model_beyond_a_node_is_unmet() -> None:
    wish = large().model_copy(update={"across_nodes": "never"})

    assert plan_of(wish, A100S.model_copy(update={"gpus_per_node": 2}), RTX).unmet


def test_pipelines_over_nodes_are_not_looked_at_where_a_node_suffices() -> None:
    assert the_only(plan_of(large(), A100S, RTX)).pools == ("a100",)


def test_always_takes_a_pipeline_over_two_pools_where_it_is_cheaper() -> None:
    wish = a_wide_wish(across_nodes="always")
    dear = a_pool("h100", gpus_per_node=1, price_per_gpu_hour=50.0)
    cheap = a_pool("l4", "L4", gpus_per_node=1, price_per_gpu_hour=0.5)
    other = a_pool("rtx", "RTX-4090", gpus_per_node=1, price_per_gpu_hour=0.4)
    catalogue = a_catalogue(wide(26))

    assert the_only(plan_of(wish, dear, cheap, other, catalogue=catalogue)).price_per_hour < 1.0
    needed = wish.model_copy(update={"across_nodes": "needed"})
    assert the_only(plan_of(needed, dear, cheap, other, catalogue=catalogue)).pool == "h100"


def test_a_model_whose_class_knows_no_pipelines_is_not_cut() -> None:
    model = wide(40, supports_pipeline_parallel=False)

    assert pair(a_wide_wish(), model, A100S, RTX) == []


def test_gpus_of_unknown_memory_and_cpus_are_left_out() -> None:
    cpu = a_pool("cpu", "cpu", memory_gib_per_gpu=64.0, kv_cache_gib_per_gpu=8.0)

    assert pair(a_wide_wish(), wide(40), A100S, cpu) == []


def test_what_does_not_fit_on_two_nodes_either_names_both() -> None:
    plan = plan_of(a_wide_wish(), A100S, RTX, catalogue=a_catalogue(wide(300)))

    assert [entry.constraint.split(":")[0] for entry in plan.unmet] == ["weights-exceed-memory"]
    assert "a100 and rtx" in {entry.shape.get("pool") for entry in plan.rejected}


def test_the_plan_survives_yaml_and_planning_again_moves_nothing() -> None:
    pools = [a_pool(f"p{n}", "A100-40-SXM", nodes=2, gpus_per_node=2) for n in range(2)]
    wish = large().model_copy(update={"replicas": ReplicaBounds(min=2, max=2)})

    plan = plan_of(wish, *pools)
    again = plan_of(wish, *pools, running=plan)

    assert parse_yaml(dump_yaml(plan), Plan, source="plan") == plan
    assert {v.variant: v.placement for v in again.variants} == {
        v.variant: v.placement for v in plan.variants
    }


def test_explanations_tell_pools_and_layers() -> None:
    few = A100S.model_copy(update={"gpus_per_node": 2})
    fleet, inventory = a_fleet(large()), an_inventory(few, RTX)
    plan = make_plan(fleet, inventory, CATALOGUE)

    (reason,) = explain(fleet, inventory, CATALOGUE, plan).reasons

    layers = "+".join(map(str, plan.variants[0].shape.layer_partition))
    assert reason.chosen[0].startswith(
        f"1 x bf16 on 2 x A100-40-SXM + 2 x RTX-4090 (pools a100 and rtx, layers {layers})"
    )


@settings(deadline=None, max_examples=25)
@given(
    layers=st.integers(3, 9),
    memory=st.tuples(st.sampled_from([5.0, 7.0, 10.0]), st.sampled_from([5.0, 7.0, 10.0])),
    gpus=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    rate=st.sampled_from([0.1, 3.0]),
)
def test_no_other_split_of_the_layers_carries_more(
    layers: int, memory: tuple[float, float], gpus: tuple[int, int], rate: float
) -> None:
    one = A100S.model_copy(update={"gpus_per_node": gpus[0], "memory_gib_per_gpu": memory[0]})
    other = RTX.model_copy(update={"gpus_per_node": gpus[1], "memory_gib_per_gpu": memory[1]})
    wish = a_wide_wish(demand=Demand(requests_per_s=rate), tensor_parallel_size=1)

    for found in pair(wish, wide(layers), one, other):
        chosen = found.candidate
        splits = every_legal_split(chosen)
        if found.rejection is not None:
            assert splits == []
            continue
        best = max(rate_of(wish, replace(chosen, layer_partition=split)) for split in splits)
        assert rate_of(wish, chosen) >= 0.99 * best
        uncut = replace(chosen, layer_partition=())
        alone = {device: speed_alone(uncut, device) for device in set(uncut.rank_devices)}
        times = stage_times(
            wish,
            uncut,
            spanning_speed(uncut, alone),
            StageMemories(uncut),
            requests=1,
            cache_tokens=2049,
        ).whole
        quickest = split_layers(times)
        assert quickest is not None
        assert slowest_s(times, quickest) == min(slowest_s(times, split) for split in splits)


def rate_of(wish: FleetModel, candidate: Candidate) -> float:
    return carried(wish, candidate, replica_speed(candidate), wish.slo).requests_per_s


def every_legal_split(candidate: Candidate) -> list[tuple[int, ...]]:
    layers, stages = candidate.architecture.num_layers, candidate.pipeline_parallel_size
    found = []
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        split = tuple(two - one for one, two in itertools.pairwise((0, *cuts, layers)))
        if first_rejection(replace(candidate, layer_partition=split)) is None:
            found.append(split)
    return found


def test_stages_that_are_alike_are_as_fast_as_the_formula_for_such_pipelines() -> None:
    device = a_gpu_device("L40S", link="pcie")
    model = CATALOGUE.model("mistral-small-3.2-24b-2506")
    alike = a_candidate(
        model, device=device, tensor_parallel_size=2, pipeline_parallel_size=2, max_model_len=8192
    )
    spelled = replace(
        alike, rank_devices=(device,) * 4, stage_nodes=(0, 0), layer_partition=(20, 20)
    )

    for concurrency in (1, 8, 64):
        load = Load(concurrency=concurrency, input_tokens=1000, output_tokens=200)
        one = predict(replica_speed(alike), load)
        other = predict(replica_speed(spelled), load)
        assert other.tpot_ms == pytest.approx(one.tpot_ms, rel=0.05)
        assert other.ttft_s == pytest.approx(one.ttft_s, rel=0.05)


def test_a_slow_network_between_stages_is_felt() -> None:
    near, far = a_gpu_device(inter_node_bytes_per_s=50e9), a_gpu_device(inter_node_bytes_per_s=1e7)
    model = CATALOGUE.model("mistral-7b-v0.3")
    fields = {"pipeline_parallel_size": 2, "stage_nodes": (0, 1), "num_nodes": 2}
    load = Load(concurrency=8, input_tokens=4000, output_tokens=100)

    quick = a_candidate(model, device=near, rank_devices=(near, near), **fields)
    slow = a_candidate(model, device=near, rank_devices=(near, far), **fields)

    assert predict(replica_speed(slow), load).ttft_s > predict(replica_speed(quick), load).ttft_s


def test_a_stage_beyond_its_nodes_gpus_is_refused() -> None:
    device = a_gpu_device(gpus_per_node=1)
    candidate = a_candidate(
        pipeline_parallel_size=2, rank_devices=(device, device), stage_nodes=(0, 0)
    )

    rejection = first_rejection(candidate)

    assert rejection is not None
    assert rejection.rule == "replica-exceeds-gpus"


@settings(deadline=None, max_examples=30)
@given(
    nodes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    gpus=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3])),
    replicas=st.integers(1, 4),
)
def test_no_gpu_is_used_twice_and_memory_is_never_exceeded(
    nodes: tuple[int, int], gpus: tuple[int, int], replicas: int
) -> None:
    one = A100S.model_copy(
        update={"nodes": nodes[0], "gpus_per_node": gpus[0], "memory_gib_per_gpu": 8.0}
    )
    other = RTX.model_copy(
        update={"nodes": nodes[1], "gpus_per_node": gpus[1], "memory_gib_per_gpu": 6.0}
    )
    wish = a_wide_wish(across_nodes="always", replicas=ReplicaBounds(min=replicas, max=replicas))

    plan = plan_of(wish, one, other, catalogue=a_catalogue(wide(12)))

    used = Counter(
        (node.node, gpu)
        for variant in plan.variants
        for replica in variant.placement
        for node in replica
        for gpu in node.gpus
    )
    assert all(times == 1 for times in used.values())
    for variant in plan.variants:
        for replica in variant.placement:
            assert sum(len(node.gpus) for node in replica) == variant.gpus_per_replica
            assert len({len(node.gpus) for node in replica}) == 1
        assert variant.shape.per_gpu.headroom_bytes >= 0
        assert variant.shape.kv_cache_tokens >= 2048


def test_the_smallest_cache_of_all_stages_is_the_replicas() -> None:
    few = A100S.model_copy(update={"gpus_per_node": 2})
    found = spanning_candidates(large(), [(few, 1), (RTX, 1)], CATALOGUE).found[0]

    use = memory_use(found.candidate)

    assert use.kv.tokens == min(stage.kv.tokens for stage in use.stages)
    assert {stage.per_gpu.total_bytes for stage in use.stages} == {
        CATALOGUE.gpu("A100-40-SXM").memory_bytes,
        CATALOGUE.gpu("RTX-4090").memory_bytes,
    }
