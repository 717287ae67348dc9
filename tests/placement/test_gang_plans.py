"""Replicas that are larger than a node: whole nodes, pipeline stages across them."""

from __future__ import annotations

from typing import Any

import pytest

from placement.catalogue import load_catalogue
from placement.errors import ConfigError
from placement.fleet import FleetModel, FleetSpec, ReplicaBounds
from placement.inventory import Inventory, Links, Pool
from placement.plan import Plan, Variant
from placement.planner import make_plan
from placement.spec import parse_yaml

CATALOGUE = load_catalogue()
LARGE = "mistral-large-2411"  # 123B: 246 GB in bf16


def a_wish(name: str = "large", **changes: Any) -> FleetModel:
    fields = {"model": LARGE, "max_model_len": 16384, "nodes_per_replica": 2}
    return FleetModel(name=name, **{**fields, **changes})


def a_pool(name: str = "a100", **changes: Any) -> Pool:
    fields = {"gpu": "A100-40-SXM", "nodes": 4, "gpus_per_node": 4}
    return Pool(name=name, **{**fields, "links": Links(inter_gbps=100), **changes})


def plan_of(*wishes: FleetModel, pools: tuple[Pool, ...] = (), running: Plan | None = None) -> Plan:
    fleet = FleetSpec(fleet="test", models=wishes or (a_wish(),))
    return make_plan(fleet, Inventory(pools=pools or (a_pool(),)), CATALOGUE, running=running)


def nodes_of(variant: Variant) -> list[list[str]]:
    return [[part.node for part in replica] for replica in variant.placement]


def test_a_model_that_no_node_holds_runs_on_two_with_a_pipeline_across():
    [variant] = plan_of().variants

    assert variant.shape.num_nodes == 2
    assert variant.shape.num_gpus == variant.gpus_per_replica == 8
    assert variant.shape.tensor_parallel_size <= 4
    assert variant.shape.pipeline_parallel_size == 8 // variant.shape.tensor_parallel_size
    assert "--nnodes" in variant.shape.engine_args
    assert variant.variant.endswith("-2nodes")
    [[first, second]] = nodes_of(variant)
    assert first != second
    assert [part.gpus for part in variant.placement[0]] == [(0, 1, 2, 3)] * 2


def test_without_several_nodes_the_same_model_fits_nowhere():
    assert plan_of(a_wish(nodes_per_replica=1, across_nodes="never")).unmet


def test_two_gangs_share_no_node_and_a_third_does_not_fit_beside_a_small_model():
    small = a_wish("small", model="mistral-7b-v0.3", nodes_per_replica=1, tensor_parallel_size=1)

    two = plan_of(a_wish(replicas=ReplicaBounds(min=2, max=2)))
    beside = plan_of(a_wish(replicas=ReplicaBounds(min=2, max=2)), small)

    [variant] = two.variants
    assert len({node for replica in nodes_of(variant) for node in replica}) == 4
    assert beside.unmet
    assert not plan_of(a_wish(), small).unmet


def test_the_nodes_of_a_gang_are_of_one_pool():
    pools = tuple(a_pool(name, nodes=1) for name in ("a", "b"))

    assert plan_of(pools=pools).unmet
    assert not plan_of(pools=(a_pool("a", nodes=1), a_pool("b", nodes=2))).unmet


def test_tensor_parallelism_crosses_nodes_only_where_the_fleet_says_so():
    memory = {"memory_gib_per_gpu": 6, "kv_cache_gib_per_gpu": 1}
    pool = a_pool("cpu", gpu="cpu", nodes=2, gpus_per_node=1, **memory)
    wish = a_wish(model="nano-7b", max_model_len=2048)

    [pipeline] = plan_of(wish, pools=(pool,)).variants
    crossing = wish.model_copy(update={"tensor_parallel_size": 2})
    [tensor] = plan_of(crossing, pools=(pool,)).variants

    assert (pipeline.shape.tensor_parallel_size, pipeline.shape.pipeline_parallel_size) == (1, 2)
    assert (tensor.shape.tensor_parallel_size, tensor.shape.pipeline_parallel_size) == (2, 1)
    assert tensor.gpus_per_replica == 2


def test_layers_are_split_as_the_fleet_says_and_a_wrong_split_is_named():
    pools = (a_pool(gpus_per_node=8),)
    right = a_wish(tensor_parallel_size=8, layer_partition=(46, 42))
    wrong = a_wish(tensor_parallel_size=8, layer_partition=(46, 46))

    [variant] = plan_of(right, pools=pools).variants
    [unmet] = plan_of(wrong, pools=pools).unmet

    assert variant.shape.engine_environment == {"VLLM_PP_LAYER_PARTITION": "46,42"}
    assert "46+46 does not make 88 layers" in unmet.constraint


def test_running_gangs_stay_on_their_nodes():
    first = plan_of(a_wish(replicas=ReplicaBounds(min=2, max=2)))
    [variant] = first.variants
    (a, b), (c, d) = variant.placement
    crossed = variant.model_copy(update={"placement": ((a, d), (c, b))})
    before = first.model_copy(update={"variants": (crossed,)})

    [kept] = plan_of(a_wish(replicas=ReplicaBounds(min=2, max=2)), running=before).variants

    assert set(kept.placement) == {(a, d), (c, b)}


def test_flags_that_the_plan_sets_are_refused_with_the_key_that_sets_them():
    text = "{fleet: f, models: [{name: m, model: x, engine_args: ['--nnodes=2']}]}"

    with pytest.raises(ConfigError, match="use nodes_per_replica"):
        parse_yaml(text, FleetSpec, source="fleet.yaml")
