"""Replicas on three nodes and more, of one pool or of several: found, placed, told and kept."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.candidate import Candidate, device_of
from placement.candidates import filled_in
from placement.catalogue import ModelSpec
from placement.changes import changes
from placement.explain import explain
from placement.fleet import Demand, FleetModel, ReplicaBounds
from placement.inventory import Links, Pool
from placement.memory import memory_use
from placement.milp import Limits
from placement.node_sets import MOST_SETS
from placement.option import carried
from placement.performance import replica_speed
from placement.plan import Plan, Variant
from placement.planner import make_plan
from placement.problem import Column, Need, Nodes, Problem
from placement.selection import select
from placement.spanning import Spanning, spanning_candidates
from placement.spec import dump_yaml, parse_yaml
from tests.placement.brute_force import fits
from tests.placement.builders import (
    CATALOGUE,
    a_catalogue,
    a_fleet,
    a_pool,
    a_wish,
    an_inventory,
)
from tests.placement.test_spanning import a_wide_wish, every_legal_split, plan_of, wide

NETWORK = Links(inter_gbps=100)
SLOWER = Links(inter_gbps=10)


def rtx(**changes: Any) -> Pool:
    return a_pool("rtx", "RTX-4090", **{"gpus_per_node": 4, "links": NETWORK, **changes})


def a100(**changes: Any) -> Pool:
    return a_pool("a100", "A100-40-SXM", **{"gpus_per_node": 4, "links": NETWORK, **changes})


def a_large(model: str, **changes: Any) -> FleetModel:
    demand = Demand(requests_per_s=0.1)
    return a_wish(model=model, **{"max_model_len": 16384, "demand": demand, **changes})


def the_only(plan: Plan) -> Variant:
    assert not plan.unmet, plan.unmet
    (variant,) = plan.variants
    return variant


def nodes_of(variant: Variant) -> list[list[str]]:
    return [[part.node for part in replica] for replica in variant.placement]


def test_mistral_large_3_in_nvfp4_runs_on_six_small_boxes() -> None:
    plan = plan_of(a_large("mistral-large-3"), rtx(nodes=6), a100())

    variant = the_only(plan)

    assert variant.shape.precision == "nvfp4"
    assert variant.hardware == "6 x (4 x RTX-4090)"
    assert variant.variant == "chat@rtx-tp4-pp6-6nodes-ep"
    assert nodes_of(variant) == [[f"rtx-{number}" for number in range(6)]]
    assert sum(variant.shape.layer_partition) == 61
    assert len(variant.shape.layer_partition) == variant.shape.pipeline_parallel_size == 6
    args = variant.shape.engine_args
    assert args[args.index("--nnodes") + 1] == "6"
    assert args[args.index("--tensor-parallel-size") + 1] == "4"
    assert variant.gpus_per_replica == 24


def test_with_one_box_fewer_it_takes_the_other_pool_too() -> None:
    variant = the_only(plan_of(a_large("mistral-large-3"), rtx(nodes=5), a100()))

    assert sorted(variant.pools) == ["a100", *["rtx"] * 5]
    assert variant.rank_pools == variant.pools
    layers = dict(zip(variant.pools, variant.shape.layer_partition, strict=True))
    assert layers["a100"] > layers["rtx"]  # more memory
    name = "chat@5-rtx-and-a100" if variant.pools[0] == "rtx" else "chat@a100-and-5-rtx"
    assert variant.variant.startswith(name)


def test_with_four_boxes_the_plan_says_what_is_missing() -> None:
    plan = plan_of(a_large("mistral-large-3", precision=("nvfp4",)), rtx(nodes=4), a100())

    (unmet,) = plan.unmet
    assert unmet.constraint.startswith("weights-exceed-memory: nvfp4 on 20 x")
    pools = {entry.shape.get("pool") for entry in plan.rejected}
    assert "a100 and 4 nodes of rtx" in pools


def test_mistral_large_2_in_bf16_runs_on_three_boxes_and_takes_only_a_part_of_one() -> None:
    plan = plan_of(a_large("mistral-large-2411"), rtx(nodes=6, price_per_gpu_hour=0.4), a100())

    variant = the_only(plan)

    assert variant.shape.precision == "bf16"
    assert len(set(variant.pools)) <= 2
    assert len({node for replica in nodes_of(variant) for node in replica}) >= 3
    # 245 GB of weights; a node of 4 x 24 GB has about 83 GB for weights and cache.
    assert 12 < variant.gpus_per_replica < 16


@pytest.mark.parametrize("across", ["never", "needed"])
def test_never_leaves_it_unmet_and_needed_prefers_one_node(across: str) -> None:
    wish = a_large("mistral-large-2411", across_nodes=across)

    alone = plan_of(wish, rtx(nodes=6), a_pool(price_per_gpu_hour=50.0))
    several = plan_of(wish, rtx(nodes=6))

    assert the_only(alone).pools == ("h100",)
    assert bool(several.unmet) == (across == "never")


def test_nodes_per_replica_takes_as_many_whole_nodes_of_a_pool_as_it_says() -> None:
    wish = a_large("mistral-large-2411", nodes_per_replica=4)

    variant = the_only(plan_of(wish, rtx(nodes=6), a100()))

    assert variant.pools == ("rtx",) * 4
    assert variant.shape.num_nodes == 4
    assert len(set(nodes_of(variant)[0])) == 4


def test_the_plan_survives_yaml_and_moves_nothing_when_made_again() -> None:
    wish = a_large("mistral-large-2411", replicas=ReplicaBounds(min=2, max=2))
    fleet, inventory = a_fleet(wish), an_inventory(rtx(nodes=9), a100())

    plan = make_plan(fleet, inventory, CATALOGUE)
    again = make_plan(fleet, inventory, CATALOGUE, running=plan)

    assert parse_yaml(dump_yaml(plan), Plan, source="plan") == plan
    assert changes(plan, again) == ()


def test_the_loss_of_any_of_its_nodes_takes_the_whole_replica() -> None:
    wish = a_large("mistral-large-2411", replicas=ReplicaBounds(min=2, max=2))

    plan = plan_of(wish, rtx(nodes=9))

    assert plan.node_loss is not None
    (variant,) = plan.variants
    assert plan.node_loss.share == pytest.approx(variant.capacity_requests_per_s / 0.1)


def test_explanations_tell_the_nodes_and_what_the_runner_up_is() -> None:
    fleet, inventory = a_fleet(a_large("mistral-large-3")), an_inventory(rtx(nodes=6), a100())
    plan = make_plan(fleet, inventory, CATALOGUE)

    (reason,) = explain(fleet, inventory, CATALOGUE, plan).reasons

    assert reason.chosen[0].startswith("1 x nvfp4 on 6 x (4 x RTX-4090) (pool rtx, layers ")
    assert reason.runner_up is not None
    assert "pools " in reason.runner_up


def test_fewer_replicas_stay_whole_on_the_nodes_where_they_are() -> None:
    wish = a_wide_wish(replicas=ReplicaBounds(min=3, max=3), tensor_parallel_size=1)
    small = rtx(nodes=9, gpus_per_node=1, memory_gib_per_gpu=8.0)
    catalogue = a_catalogue(wide(11))
    three = plan_of(wish, small, catalogue=catalogue)
    (variant,) = three.variants
    a, b, c = variant.placement
    crossed = ((a[0], c[1], b[2]), (b[0], a[1], c[2]), (c[0], b[1], a[2]))
    before = three.model_copy(
        update={"variants": (variant.model_copy(update={"placement": crossed}),)}
    )

    two = wish.model_copy(update={"replicas": ReplicaBounds(min=2, max=2)})
    (kept,) = plan_of(two, small, catalogue=catalogue, running=before).variants

    assert variant.pools == ("rtx",) * 3
    assert len(kept.placement) == 2
    assert set(kept.placement) <= set(crossed)


def test_replicas_on_alike_nodes_of_two_pools_mix_them_as_little_as_can_be() -> None:
    wish = a_wide_wish(replicas=ReplicaBounds(min=2, max=2), tensor_parallel_size=1)
    pools = [
        a_pool(name, "RTX-4090", nodes=3, gpus_per_node=1, memory_gib_per_gpu=8.0, links=NETWORK)
        for name in ("one", "two")
    ]

    plan = plan_of(wish, *pools, catalogue=a_catalogue(wide(11)))

    assert sorted(variant.pools for variant in plan.variants) == [("one",) * 3, ("two",) * 3]
    assert len({variant.variant for variant in plan.variants}) == 2


def test_a_set_of_nodes_that_carries_no_more_than_a_part_of_it_is_told_as_dominated() -> None:
    plan = plan_of(
        a_large("mistral-large-2411", across_nodes="always"), rtx(nodes=6), a100(nodes=2)
    )

    dropped = [entry for entry in plan.rejected if entry.rule == "dominated"]

    assert dropped
    assert any("6 x (4 x RTX-4090)" in entry.reason or " + " in entry.reason for entry in dropped)


def test_where_the_search_was_cut_the_plan_says_so() -> None:
    pools = [
        a_pool(f"p{n}", "RTX-4090", nodes=4, gpus_per_node=1, price_per_gpu_hour=1 + n / 100)
        for n in range(5)
    ]

    plan = plan_of(a_large("mixtral-8x7b", across_nodes="always"), *pools)

    assert the_only(plan).gpus_per_replica >= 5
    (cut,) = [entry for entry in plan.rejected if entry.rule == "node-sets-left-out"]
    assert cut.shape["model"] == "chat"
    assert cut.reason.startswith(f"{MOST_SETS} sets of at most 16 nodes were looked at")


small_kinds = st.tuples(
    st.integers(0, 3),  # nodes
    st.sampled_from([1, 2]),  # GPUs
    st.sampled_from([4.5, 6.0, 8.0]),  # GiB
)


def small_pools(kinds: Sequence[tuple[int, int, float]]) -> list[tuple[Pool, int]]:
    names = [("rtx", "RTX-4090", NETWORK), ("l40s", "L40S", SLOWER)]
    return [
        (
            a_pool(name, gpu, links=links, nodes=max(nodes, 1), gpus_per_node=gpus).model_copy(
                update={"memory_gib_per_gpu": gib}
            ),
            nodes,
        )
        for (name, gpu, links), (nodes, gpus, gib) in zip(names, kinds, strict=False)
    ]


def uncut(found: Spanning, order: Sequence[int], ranks: int) -> Candidate:
    """The candidate with its nodes in another order, in tensor-parallel groups of `ranks`."""
    nodes = [found.nodes[index] for index in order]
    stages = [node.gpus // ranks for node in nodes]
    return replace(
        found.candidate,
        tensor_parallel_size=ranks,
        pipeline_parallel_size=sum(stages),
        device=nodes[0].device,
        rank_devices=tuple(node.device for node in nodes for _ in range(node.gpus)),
        stage_nodes=tuple(at for at, count in enumerate(stages) for _ in range(count)),
        layer_partition=(),
    )


def every_way(found: Spanning) -> Iterator[Candidate]:
    """All orders of its nodes, tensor parallel sizes and splits that are legal."""
    sizes = [1, 2] if all(node.gpus == 2 for node in found.nodes) else [1]
    seen = set()
    for order in itertools.permutations(range(len(found.nodes))):
        told = tuple((found.nodes[at].pool.name, found.nodes[at].gpus) for at in order)
        if told in seen:
            continue
        seen.add(told)
        for ranks in sizes:
            candidate = uncut(found, order, ranks)
            for split in every_legal_split(candidate):
                yield replace(candidate, layer_partition=split)


def rate_of(wish: FleetModel, candidate: Candidate) -> float:
    return carried(wish, candidate, replica_speed(candidate), wish.slo).requests_per_s


@settings(deadline=None, max_examples=20)
@given(
    layers=st.integers(4, 8),
    kinds=st.lists(small_kinds, min_size=1, max_size=2),
    rate=st.sampled_from([0.1, 3.0]),
)
def test_no_other_order_of_the_nodes_and_split_of_the_layers_carries_more(
    layers: int, kinds: list[tuple[int, int, float]], rate: float
) -> None:
    wish = a_wide_wish(demand=Demand(requests_per_s=rate))
    spans = spanning_candidates(wish, small_pools(kinds), a_catalogue(wide(layers)))

    for found in spans.found:
        if len(found.nodes) > 4:
            continue  # too many ways to try them all
        rates = [rate_of(wish, way) for way in every_way(found)]
        assert (found.rejection is None) == bool(rates)
        if found.rejection is None:
            assert rate_of(wish, found.candidate) >= 0.99 * max(rates)
            use = memory_use(found.candidate)
            assert all(stage.missing_bytes == 0 for stage in use.stages)
            assert all(stage.kv.tokens >= 2048 for stage in use.stages)


def every_set(places: Sequence[tuple[Pool, int]]) -> list[tuple[tuple[str, int], ...]]:
    """Of each node its pool and the GPUs taken of it: any number of any nodes, up to four GPUs."""
    nodes = [(pool.name, pool.gpus_per_node) for pool, count in places for _ in range(count)]
    found = set()
    for taken in itertools.product(*(range(gpus + 1) for _, gpus in nodes)):
        chosen = [(name, gpus) for (name, _), gpus in zip(nodes, taken, strict=True) if gpus]
        if len(chosen) > 1 and sum(taken) <= 4:
            found.add(tuple(sorted(chosen)))
    return sorted(found)


def holds(
    wish: FleetModel, model: ModelSpec, pools: Sequence[Pool], nodes: Sequence[tuple[str, int]]
) -> bool:
    """Whether any order of these GPUs, each a stage, and any split of the layers is legal."""
    catalogue = a_catalogue(model)
    devices = {pool.name: device_of(pool, catalogue.gpu(pool.gpu)) for pool in pools}
    for order in set(itertools.permutations(nodes)):
        ranks = tuple(devices[name] for name, gpus in order for _ in range(gpus))
        candidate = replace(
            filled_in(wish, model, model.checkpoints[0], ranks[0], 1),
            num_nodes=len(ranks),
            pipeline_parallel_size=len(ranks),
            rank_devices=ranks,
            stage_nodes=tuple(at for at, (_, gpus) in enumerate(order) for _ in range(gpus)),
        )
        if every_legal_split(candidate):
            return True
    return False


@settings(deadline=None, max_examples=15)
@given(layers=st.integers(5, 8), kinds=st.lists(small_kinds, min_size=1, max_size=2))
def test_the_plan_is_as_cheap_as_the_cheapest_of_all_sets_of_nodes_that_hold_the_model(
    layers: int, kinds: list[tuple[int, int, float]]
) -> None:
    wish = a_wide_wish(demand=Demand(requests_per_s=0.001), tensor_parallel_size=1)
    model, places = wide(layers), [place for place in small_pools(kinds) if place[1]]
    prices = {"rtx": 0.5, "l40s": 0.8}
    pools = [
        pool.model_copy(update={"price_per_gpu_hour": prices[pool.name]}) for pool, _ in places
    ] or [rtx(nodes=2, gpus_per_node=1, price_per_gpu_hour=0.5)]

    plan = plan_of(wish, *pools, catalogue=a_catalogue(model))

    if any(len(variant.pools) == 1 for variant in plan.variants):
        return  # one node is enough
    cheapest = min(
        (
            sum(gpus * prices[name] for name, gpus in each)
            for each in every_set([(pool, pool.nodes) for pool in pools])
            if holds(wish, model, pools, each)
        ),
        default=None,
    )
    if plan.unmet or plan.gpus_used > 4:
        assert cheapest is None
    else:
        assert plan.cost_per_hour == pytest.approx(cheapest)


@settings(deadline=None, max_examples=30)
@given(
    kinds=st.lists(small_kinds, min_size=1, max_size=2),
    replicas=st.integers(1, 3),
    layers=st.integers(6, 16),
)
def test_no_gpu_is_used_twice_and_each_replica_stands_as_its_variant_says(
    kinds: list[tuple[int, int, float]], replicas: int, layers: int
) -> None:
    wish = a_wide_wish(across_nodes="always", replicas=ReplicaBounds(min=replicas, max=replicas))
    pools = [pool for pool, nodes in small_pools(kinds) if nodes] or [rtx()]

    plan = plan_of(wish, *pools, catalogue=a_catalogue(wide(layers)))

    pool_of = {node: pool.name for pool in pools for node in pool.names()}
    used = Counter(
        (node.node, gpu)
        for variant in plan.variants
        for replica in variant.placement
        for node in replica
        for gpu in node.gpus
    )
    assert all(times == 1 for times in used.values())
    assert len({variant.variant for variant in plan.variants}) == len(plan.variants)
    for variant in plan.variants:
        assert variant.shape.num_nodes == len(variant.rank_pools)
        for replica in variant.placement:
            assert tuple(pool_of[node.node] for node in replica) == variant.rank_pools
            assert sum(len(node.gpus) for node in replica) == variant.gpus_per_replica
        assert variant.shape.per_gpu.headroom_bytes >= 0
        assert variant.shape.kv_cache_tokens >= 2048


def test_a_column_with_unequal_parts_in_a_group_may_fill_its_nodes() -> None:
    both = Column(model=0, group=0, gpus=8, rate=1.0, price=3.0, beside=((0, 8), (0, 4)))
    need = Need(rate=2.0, least=1, most=8)
    problem = Problem(columns=(both,), needs=(need,), groups=(Nodes(5, 8),))

    found = select(problem, Limits())

    assert problem.most(0) == 2
    assert found.counts == (2,)
    assert fits(problem, found.counts)
    assert not fits(problem, (3,))
