from __future__ import annotations

import re

from placement.candidates import candidates
from placement.catalogue import CONFIGS
from placement.fleet import FleetSpec
from placement.inventory import Inventory, Pool
from placement.plan import Plan
from placement.planner import make_plan
from placement.routing_policy import RoutingPolicy
from placement.spec import dump_yaml, load_yaml, parse_yaml
from tests.placement.builders import (
    CATALOGUE,
    a_model,
    a_pool,
    a_wish,
    an_architecture,
    experts,
)
from tests.placement.plans import plan_for, plan_on_cpu, the_only


def test_forced_expert_parallelism_shows_in_name_and_flags() -> None:
    model = a_model(architecture=an_architecture(moe=experts()))
    wish = a_wish(tensor_parallel_size=2, expert_parallel=True)

    variant = the_only(plan_on_cpu(wish, model))

    assert variant.variant == "chat@local-tp2-ep"
    assert "--enable-expert-parallel" in variant.shape.engine_args
    assert variant.placement[0][0].gpus == (0, 1)
    assert variant.shape.kv_cache_tokens == 1_048_576


def test_a_plan_carries_how_requests_are_spread_and_survives_yaml() -> None:
    policy = RoutingPolicy(policy="prefix", weights={"chat@a": 0.5})
    wish = a_wish("chat", "mistral-7b", routing=policy, fallback=("small",))

    plan = plan_for(wish, a_wish("small", "mistral-7b"), pools=[a_pool("h100")])

    chat = next(variant for variant in plan.variants if variant.model == "chat")
    assert (chat.routing, chat.fallback) == (policy, ("small",))
    assert parse_yaml(dump_yaml(plan), Plan, source="plan") == plan


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


def test_a_plan_survives_yaml() -> None:
    fleet = load_yaml(CONFIGS / "fleets" / "mixed.yaml", FleetSpec)
    inventory = load_yaml(CONFIGS / "fleets" / "mixed.inventory.yaml", Inventory)

    plan = make_plan(fleet, inventory, CATALOGUE)

    assert plan.unmet == ()
    assert len(plan.variants) == 3
    assert parse_yaml(dump_yaml(plan), Plan, source="plan") == plan


def test_pipelines_are_looked_at_where_gpus_have_no_nvlink() -> None:
    def stages(pool: Pool) -> set[object]:
        found = candidates(a_wish(model="mistral-small-3.2"), pool, CATALOGUE)
        assert all(each.num_ranks <= pool.gpus_per_node for each in found)
        return {each.pipeline_parallel_size for each in found}

    assert stages(a_pool("box", "RTX-4090", gpus_per_node=4)) == {1, 2, 4}
    assert stages(a_pool("h100")) == {1}
