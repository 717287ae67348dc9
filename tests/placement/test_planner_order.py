"""No GPU twice, nothing lost, in whatever order: of any fleet on any pools."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from placement.fleet import Demand, FleetModel, ReplicaBounds
from placement.inventory import Pool
from tests.placement.builders import (
    a_pool,
    a_wish,
)
from tests.placement.plans import plan_for

MODELS = ("mistral-7b", "mixtral-8x7b", "mistral-small-3.2", "ministral-3-8b", "mistral-large-3")


GPUS = ("H100-SXM", "A100-80-SXM", "RTX-4090", "L40S", "H200-SXM", "V100-32")


@st.composite
def fleets(draw: st.DrawFn) -> list[FleetModel]:
    wishes = []
    for index in range(draw(st.integers(1, 5))):
        low = draw(st.integers(0, 3))
        rate = draw(st.none() | st.floats(0, 200))
        wishes.append(
            a_wish(
                f"m{index}",
                draw(st.sampled_from(MODELS)),
                demand=None if rate is None else Demand(requests_per_s=rate),
                replicas=ReplicaBounds(min=low, max=draw(st.integers(max(low, 1), 6))),
                engine=draw(st.sampled_from(["vllm", "sim"])),
            )
        )
    return wishes


@st.composite
def pool_lists(draw: st.DrawFn) -> list[Pool]:
    return [
        a_pool(
            f"p{index}",
            draw(st.sampled_from(GPUS)),
            nodes=draw(st.integers(1, 3)),
            gpus_per_node=draw(st.integers(1, 8)),
        )
        for index in range(draw(st.integers(1, 4)))
    ]


@settings(deadline=None)
@given(wishes=fleets(), pools=pool_lists())
def test_no_gpu_is_used_twice_and_nothing_is_lost(
    wishes: list[FleetModel], pools: list[Pool]
) -> None:
    plan = plan_for(*wishes, pools=pools)

    used = Counter(
        (node.node, gpu)
        for variant in plan.variants
        for replica in variant.placement
        for node in replica
        for gpu in node.gpus
    )
    room = {node: pool.gpus_per_node for pool in pools for node in pool.names()}
    assert set(used.values()) <= {1}
    assert all(gpu < room[node] for node, gpu in used)
    assert plan.gpus_used == len(used) <= plan.gpus_total
    for variant in plan.variants:
        assert len(variant.placement) == variant.replicas <= variant.bounds.max
        assert min(variant.shape.per_gpu.model_dump().values()) >= 0
    spoken_of = {variant.model for variant in plan.variants} | {entry.model for entry in plan.unmet}
    assert spoken_of == {wish.name for wish in wishes}
    assert (plan.status == "infeasible") == bool(plan.unmet)
    assert plan.objective >= plan.bound or plan.unmet


@settings(deadline=None)
@given(wishes=fleets(), pools=pool_lists(), random=st.randoms(use_true_random=False))
def test_the_order_of_models_and_pools_does_not_matter(
    wishes: list[FleetModel], pools: list[Pool], random: Random
) -> None:
    shuffled, other_pools = wishes.copy(), pools.copy()
    random.shuffle(shuffled)
    random.shuffle(other_pools)

    assert plan_for(*wishes, pools=pools) == plan_for(*shuffled, pools=other_pools)
