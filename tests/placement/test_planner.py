from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.candidates import candidates
from placement.catalogue import CONFIGS, Catalogue, Checkpoint, ModelSpec
from placement.errors import UnknownName
from placement.fleet import Demand, FleetModel, FleetSpec, Objective, ReplicaBounds
from placement.inventory import Inventory, Pool
from placement.plan import Plan, Variant
from placement.planner import make_plan
from placement.routing_policy import RoutingPolicy
from placement.spec import dump_yaml, load_yaml, parse_yaml
from tests.placement.builders import (
    CATALOGUE,
    a_catalogue,
    a_cpu_pool,
    a_fleet,
    a_latent,
    a_model,
    a_pool,
    a_wish,
    an_architecture,
    an_inventory,
    experts,
)


def plan_for(
    *wishes: FleetModel,
    pools: Sequence[Pool] = (),
    catalogue: Catalogue = CATALOGUE,
    **changes: Any,
) -> Plan:
    return make_plan(a_fleet(*wishes, **changes), an_inventory(*pools), catalogue)


def plan_on_cpu(
    wish: FleetModel | None = None, model: ModelSpec | None = None, **pool: Any
) -> Plan:
    wish = wish or a_wish()
    return plan_for(wish, pools=[a_cpu_pool(**pool)], catalogue=a_catalogue(model or a_model()))


def the_only(plan: Plan) -> Variant:
    assert plan.status == "optimal", plan.unmet
    (variant,) = plan.variants
    return variant


def test_a_small_model_gets_one_slot_of_a_cpu_pool() -> None:
    variant = the_only(plan_on_cpu())

    assert variant.variant == "chat@local-tp1"
    assert variant.gpu == "cpu"
    assert [[(node.node, node.gpus) for node in gpus] for gpus in variant.placement] == [
        [("local-0", (0,))]
    ]
    assert variant.shape.kv_cache_tokens == 524_288
    assert (variant.shape.max_num_seqs, variant.shape.max_num_batched_tokens) == (32, 2048)
    assert variant.shape.max_model_len == 8192


def test_latents_on_a_cpu_need_steps_that_hold_whole_prompts() -> None:
    model = a_model(architecture=an_architecture(mla=a_latent(), head_dim=192))

    variant = the_only(plan_on_cpu(a_wish(max_model_len=4096), model))
    short = the_only(plan_on_cpu(a_wish(max_model_len=512), model))

    assert variant.shape.max_num_batched_tokens == 4096
    assert short.shape.max_num_batched_tokens == 2048


def test_forced_expert_parallelism_shows_in_name_and_flags() -> None:
    model = a_model(architecture=an_architecture(moe=experts()))
    wish = a_wish(tensor_parallel_size=2, expert_parallel=True)

    variant = the_only(plan_on_cpu(wish, model))

    assert variant.variant == "chat@local-tp2-ep"
    assert "--enable-expert-parallel" in variant.shape.engine_args
    assert variant.placement[0][0].gpus == (0, 1)
    assert variant.shape.kv_cache_tokens == 1_048_576


def test_a_simulation_on_a_cpu_pool_takes_one_slot_and_the_memory_of_its_gpu() -> None:
    wish = a_wish(model="mistral-large-3", engine="sim", simulate_gpu="h200")

    variant = the_only(plan_for(wish, pools=[a_cpu_pool()]))

    assert variant.gpu == "cpu"
    assert variant.simulated_gpu == "H200-SXM"
    assert variant.gpus_per_replica == 1
    assert variant.shape.num_gpus > 1
    assert variant.shape.per_gpu.total_bytes == CATALOGUE.gpu("h200").memory_bytes
    assert variant.shape.max_num_seqs == 256


def test_a_simulation_on_real_gpus_is_of_those_gpus() -> None:
    wish = a_wish(model="mistral-7b", engine="sim", simulate_gpu="h200")

    variant = the_only(plan_for(wish))

    assert variant.simulated_gpu == "H100-SXM"


def test_a_plan_carries_how_requests_are_spread_and_survives_yaml() -> None:
    policy = RoutingPolicy(policy="prefix", weights={"chat@a": 0.5})
    wish = a_wish("chat", "mistral-7b", routing=policy, fallback=("small",))

    plan = plan_for(wish, a_wish("small", "mistral-7b"), pools=[a_pool("h100")])

    chat = next(variant for variant in plan.variants if variant.model == "chat")
    assert (chat.routing, chat.fallback) == (policy, ("small",))
    assert parse_yaml(dump_yaml(plan), Plan, source="plan") == plan


def test_the_cheapest_pool_that_carries_the_demand_wins() -> None:
    dear, cheap = a_pool("h100"), a_pool("rtx4090", "RTX-4090")
    wish = a_wish(model="mistral-7b", demand=Demand(requests_per_s=1.0))

    variant = the_only(plan_for(wish, pools=[dear, cheap]))

    assert variant.pool == "rtx4090"


def test_a_service_level_that_the_cheapest_pool_misses_moves_the_model() -> None:
    dear, cheap = a_pool("h100"), a_pool("l4", "L4", price_per_gpu_hour=0.5)
    wish = a_wish(
        model="mistral-7b", precision=("bf16",), tensor_parallel_size=1,
        slo=Objective(tpot_p95_ms=20),
    )  # fmt: skip

    assert the_only(plan_for(wish, pools=[dear, cheap])).pool == "h100"


def test_a_price_that_nobody_knows_does_not_look_like_a_gift() -> None:
    known, unknown = a_pool("l40s", "L40S"), a_pool("l4", "RTX-6000-Ada")

    assert the_only(plan_for(a_wish(model="mistral-7b"), pools=[known, unknown])).pool == "l40s"


def test_throughput_prefers_the_pool_that_serves_most() -> None:
    fast, cheap = a_pool("h100"), a_pool("rtx4090", "RTX-4090")

    plan = plan_for(a_wish(model="mistral-7b"), pools=[fast, cheap], objective="throughput")

    assert the_only(plan).pool == "h100"


@pytest.mark.parametrize(
    ("rate", "bounds", "replicas"),
    [
        (None, ReplicaBounds(min=0, max=4), 1),
        (None, ReplicaBounds(min=2, max=4), 2),
        (0.0, ReplicaBounds(min=0, max=4), 0),
        (0.1, ReplicaBounds(min=0, max=4), 1),
        (0.1, ReplicaBounds(min=3, max=4), 3),
        (30.0, ReplicaBounds(min=0, max=8), 2),
    ],
)
def test_as_many_replicas_start_as_the_demand_needs(
    rate: float | None, bounds: ReplicaBounds, replicas: int
) -> None:
    demand = None if rate is None else Demand(requests_per_s=rate)
    wish = a_wish(
        model="mistral-small-3.2", precision=("bf16",), demand=demand, replicas=bounds,
        tensor_parallel_size=1, max_model_len=32768,
    )  # fmt: skip

    assert the_only(plan_for(wish)).replicas == replicas


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


def test_a_context_left_open_shrinks_to_what_the_cache_holds() -> None:
    model = a_model(context=1_000_000)
    wish = a_wish()

    variant = the_only(plan_on_cpu(wish, model, kv_cache_gib_per_gpu=1 / 128))

    assert variant.shape.max_model_len == 3072
    assert variant.shape.max_concurrency >= 1


def test_a_context_that_was_asked_for_does_not_shrink() -> None:
    wish = a_wish(max_model_len=8192, tensor_parallel_size=1)

    plan = plan_on_cpu(wish, kv_cache_gib_per_gpu=1 / 128)

    assert plan.unmet[0].constraint.startswith("kv-cache-below-one-request:")
    assert plan.unmet[0].cheapest_relaxation == "max_model_len: 3968"


def test_unknown_pools_and_models_are_named_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'h100'"):
        plan_for(a_wish(model="mistral-7b", pools=("h10",)))
    with pytest.raises(UnknownName, match=r"mistral-7b-v0\.3"):
        plan_for(a_wish(model="mistral-7b-v0.5"))


def test_big_models_are_placed_before_small_ones() -> None:
    big = a_wish("b", "mistral-small-3.2", tensor_parallel_size=8, max_model_len=8192)
    small = a_wish("a", "mistral-7b", tensor_parallel_size=1)

    plan = plan_for(small, big, pools=[a_pool(nodes=2)])

    assert {v.model: v.placement[0][0].node for v in plan.variants} == {
        "b": "h100-0",
        "a": "h100-1",
    }


def test_names_with_slashes_stay_apart_and_safe() -> None:
    names = ["team/a", "team:a", "team-a", "x/y"]

    plan = plan_for(*(a_wish(name, "mistral-7b") for name in names))

    variants = [variant.variant for variant in plan.variants]
    assert len(set(variants)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+@[A-Za-z0-9._-]+", name) for name in variants)
    assert any(name.startswith("x-y@") for name in variants)


def test_flags_come_in_the_order_planned_then_model_then_fleet() -> None:
    wish = a_wish(model="mistral-7b", engine_args=("--enforce-eager",))

    args = the_only(plan_for(wish)).shape.engine_args

    assert args[:2] == ("--model", "mistralai/Mistral-7B-Instruct-v0.3")
    assert args[args.index("--gpu-memory-utilization") + 1] == "0.92"
    assert args.index("--dtype") < args.index("--tool-call-parser") < args.index("--enforce-eager")


def test_on_a_cpu_the_cache_is_given_in_bytes() -> None:
    args = the_only(plan_on_cpu(kv_cache_gib_per_gpu=0.5)).shape.engine_args

    assert args[args.index("--kv-cache-memory-bytes") + 1] == str(2**29)
    assert "--gpu-memory-utilization" not in args


def test_a_plan_survives_yaml() -> None:
    fleet = load_yaml(CONFIGS / "fleets" / "mixed.yaml", FleetSpec)
    inventory = load_yaml(CONFIGS / "fleets" / "mixed.inventory.yaml", Inventory)

    plan = make_plan(fleet, inventory, CATALOGUE)

    assert plan.unmet == ()
    assert len(plan.variants) == 3
    assert parse_yaml(dump_yaml(plan), Plan, source="plan") == plan


def zoned(name: str, zone: str, **changes: Any) -> Pool:
    return a_pool(name, labels={"zone": zone}, **changes)


def test_two_replicas_are_in_two_zones_where_that_costs_nothing() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(min=2, max=2), tensor_parallel_size=1)
    here, there = zoned("h1", "a"), zoned("h2", "b")
    dearer = zoned("h2", "b", price_per_gpu_hour=9.0)

    spread = plan_for(wish, pools=[here, there])
    costly = plan_for(wish, pools=[here, dearer])
    packed = plan_for(wish.model_copy(update={"spread": False}), pools=[here, there])

    assert [(v.pool, v.replicas) for v in spread.variants] == [("h1", 1), ("h2", 1)]
    assert [(v.pool, v.replicas) for v in costly.variants] == [("h1", 2)]
    assert [(v.pool, v.replicas) for v in packed.variants] == [("h1", 2)]


def test_pools_that_are_alike_are_one_to_the_solver_and_keep_their_names() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(min=3, max=5), tensor_parallel_size=8)

    plan = plan_for(wish, pools=[a_pool("h1"), a_pool("h2", nodes=2)])

    assert [(v.variant, v.replicas) for v in plan.variants] == [
        ("chat@h1-tp8", 1),
        ("chat@h2-tp8", 2),
    ]
    assert [(v.bounds.min, v.bounds.max) for v in plan.variants] == [(1, 3), (2, 2)]


def test_a_model_is_served_by_two_kinds_of_gpus_when_neither_suffices_alone() -> None:
    wish = a_wish(model="mistral-7b", tensor_parallel_size=1, replicas=ReplicaBounds(min=3, max=3))

    plan = plan_for(wish, pools=[a_pool(gpus_per_node=2), a_pool("l40s", "L40S", gpus_per_node=2)])

    assert plan.status == "optimal"
    assert sorted((v.pool, v.replicas) for v in plan.variants) == [("h100", 1), ("l40s", 2)]


def test_spare_nodes_stay_empty() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(min=2, max=2), tensor_parallel_size=8)

    enough = plan_for(wish, pools=[a_pool(nodes=3)], spare_nodes=1)
    short = plan_for(wish, pools=[a_pool(nodes=2)], spare_nodes=1)

    used = {node.node for v in enough.variants for replica in v.placement for node in replica}
    assert used == {"h100-0", "h100-1"}
    assert short.status == "infeasible"


def test_no_more_of_a_demand_depends_on_spot_nodes_than_allowed() -> None:
    demand = Demand(requests_per_s=60.0)
    wish = a_wish(
        model="mistral-7b", demand=demand, replicas=ReplicaBounds(max=16), tensor_parallel_size=1
    )
    pools = [a_pool("spot", spot=True, price_per_gpu_hour=0.5), a_pool("firm", nodes=2)]

    free = plan_for(wish, pools=pools)
    half = plan_for(wish, pools=pools, max_spot_share=0.5)

    assert {v.pool for v in free.variants} == {"spot"}
    firm = sum(v.replicas * v.capacity_requests_per_s for v in half.variants if v.pool == "firm")
    assert firm >= 30 * (1 - 1e-6)
    assert {v.pool for v in half.variants} == {"spot", "firm"}


def test_a_demand_that_only_spot_nodes_could_carry_says_so() -> None:
    wish = a_wish(model="mistral-7b", demand=Demand(requests_per_s=5.0))

    plan = plan_for(wish, pools=[a_pool(spot=True)], max_spot_share=0.5)

    (unmet,) = plan.unmet
    assert "2.5 requests/s must not depend on spot nodes" in unmet.constraint
    assert unmet.cheapest_relaxation.startswith("max_spot_share: 1")


def test_throughput_fills_what_there_is_up_to_the_replica_limit() -> None:
    wish = a_wish(model="mistral-7b", replicas=ReplicaBounds(max=6), tensor_parallel_size=1)

    plan = plan_for(wish, pools=[a_pool()], objective="throughput")

    assert the_only(plan).replicas == 6


def test_headroom_is_that_of_the_fullest_model() -> None:
    wishes = [
        a_wish(
            name, "mistral-7b", demand=Demand(requests_per_s=rate),
            replicas=ReplicaBounds(max=8), tensor_parallel_size=1,
        )
        for name, rate in (("a", 10.0), ("b", 30.0))
    ]  # fmt: skip

    plan = plan_for(*wishes, objective="headroom")

    assert {v.model: v.replicas for v in plan.variants} == {"a": 2, "b": 6}
    assert plan.objective == pytest.approx(max(v.predicted.utilization for v in plan.variants))


def test_a_plan_that_must_hold_when_engines_are_slower_costs_what_the_other_says() -> None:
    wish = a_wish(
        model="mistral-small-3.2", demand=Demand(requests_per_s=1.0),
        slo=Objective(tpot_p95_ms=50), replicas=ReplicaBounds(max=16), tensor_parallel_size=1,
        max_model_len=16384,
    )  # fmt: skip
    full = 2.99 * the_only(plan_for(wish)).capacity_requests_per_s
    wish = wish.model_copy(update={"demand": Demand(requests_per_s=full)})

    rosy = plan_for(wish, pools=[a_pool(nodes=2)])
    careful = plan_for(wish, pools=[a_pool(nodes=2)], robust="require")

    assert rosy.robustness is not None
    assert rosy.robustness.short == ("chat",)
    assert rosy.robustness.objective_to_hold == pytest.approx(careful.cost_per_hour)
    assert careful.cost_per_hour > rosy.cost_per_hour


def test_pipelines_are_looked_at_where_gpus_have_no_nvlink() -> None:
    def stages(pool: Pool) -> set[object]:
        found = candidates(a_wish(model="mistral-small-3.2"), pool, CATALOGUE)
        assert all(each.num_ranks <= pool.gpus_per_node for each in found)
        return {each.pipeline_parallel_size for each in found}

    assert stages(a_pool("box", "RTX-4090", gpus_per_node=4)) == {1, 2, 4}
    assert stages(a_pool("h100")) == {1}


def test_a_shape_that_another_can_always_replace_is_told_as_dominated() -> None:
    plan = plan_for(a_wish(model="mistral-small-3.2", precision=("bf16", "fp8")))

    dominated = [entry for entry in plan.rejected if entry.rule == "dominated"]
    assert any("carries" in entry.reason for entry in dominated)


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


def test_a_gguf_checkpoint_is_rejected_once() -> None:
    gguf = Checkpoint(precision="q4_k_m", format="gguf", source="x")
    model = a_model(checkpoints=(gguf,))

    plan = plan_for(a_wish(), catalogue=a_catalogue(model))

    assert [entry.rule for entry in plan.rejected] == ["engine-has-no-loader"]


def test_a_simulation_stands_for_as_few_gpus_as_hold_the_model() -> None:
    """Its slots cost the same whatever they stand for."""
    wish = a_wish(model="mistral-7b", engine="sim", simulate_gpu="h200")

    plan = plan_for(wish, pools=[a_cpu_pool()])

    assert the_only(plan).shape.num_gpus == 1
