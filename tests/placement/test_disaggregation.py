"""Plans in which prompts are read on some GPUs and answers written on others."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.changes import changes, migration
from placement.errors import ConfigError
from placement.explain import explain
from placement.fleet import Demand, FleetModel, FleetSpec, Objective, ReplicaBounds, TokenLengths
from placement.inventory import Links, Pool
from placement.migration import Create, Resize
from placement.milp import Limits
from placement.node_loss import losses
from placement.plan import Plan, Variant
from placement.planner import make_plan
from placement.roles import requests_per_s_of
from placement.spec import parse_yaml
from tests.placement.builders import CATALOGUE, a_fleet, a_pool, a_wish, an_inventory

LINKS = Links(intra="nvlink", inter_gbps=400)
H100 = a_pool("h100", nodes=2, links=LINKS)
A100 = a_pool("a100", "A100-80-SXM", nodes=2, links=LINKS)
POOLS = (H100, A100)


def documents(rate: float = 4.0, **changes: Any) -> FleetModel:
    """Long prompts, short answers, an eager reader."""
    fields: dict[str, Any] = {
        "name": "documents",
        "model": "mistral-small-3.2",
        "max_model_len": 32768,
        "disaggregate": "always",
        "demand": Demand(
            requests_per_s=rate,
            input_tokens=TokenLengths(mean=8000, p95=24000),
            output_tokens=TokenLengths(mean=400, p95=900),
        ),
        "slo": Objective(ttft_p95_s=6.0, tpot_p95_ms=30),
        "replicas": ReplicaBounds(min=1, max=24),
    }
    return a_wish(**{**fields, **changes})


def planned(
    *wishes: FleetModel,
    pools: tuple[Pool, ...] = POOLS,
    running: Plan | None = None,
    **changes: Any,
) -> Plan:
    fleet = a_fleet(*(wishes or (documents(),)), **changes)
    return make_plan(fleet, an_inventory(*pools), CATALOGUE, running=running)


def roles(plan: Plan, model: str = "documents") -> dict[str, Variant]:
    return {variant.role: variant for variant in plan.variants if variant.model == model}


def carried(variant: Variant) -> float:
    return variant.replicas * variant.capacity_requests_per_s


def test_nobody_gets_roles_who_did_not_ask() -> None:
    plan = planned(documents(disaggregate="never"))

    assert set(roles(plan)) == {"whole"}
    assert not any(entry.rule.startswith("handover") for entry in plan.rejected)


def test_both_sides_carry_the_demand_and_neither_is_larger_than_it_needs_be() -> None:
    plan = planned(documents(4.0))
    side = roles(plan)

    assert plan.unmet == ()
    assert set(side) == {"prefill", "decode"}
    for variant in side.values():
        assert carried(variant) >= 4.0 * (1 - 1e-6)
        assert carried(variant) - variant.capacity_requests_per_s < 4.0
        assert variant.predicted.utilization == pytest.approx(4.0 / carried(variant))
        assert variant.predicted.ttft_p95_s <= 6.0
        assert variant.predicted.tpot_p95_ms <= 30
    assert side["prefill"].predicted.ttft_p95_s == side["decode"].predicted.ttft_p95_s


def test_a_side_is_named_flagged_and_noted_by_its_role() -> None:
    side = roles(planned())

    for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        variant = side[role]
        size = variant.shape.tensor_parallel_size
        assert variant.variant == f"documents@{variant.pool}-tp{size}-{role}"
        assert any(kv_role in flag for flag in variant.shape.engine_args)
        assert any("experimental" in note for note in variant.shape.notes)
        assert variant.speed is None  # engines that do both are measured, and only they


def test_each_side_gets_gpus_of_its_own() -> None:
    plan = planned()
    taken = [
        (node.node, gpu)
        for variant in plan.variants
        for replica in variant.placement
        for node in replica
        for gpu in node.gpus
    ]

    assert len(taken) == len(set(taken)) == plan.gpus_used
    assert sum(variant.price_per_hour for variant in plan.variants) == pytest.approx(
        plan.cost_per_hour
    )


def test_roles_are_chosen_where_they_are_cheaper_and_only_there() -> None:
    short = Demand(requests_per_s=4.0)
    whole = planned(documents(disaggregate="never"))

    free = planned(documents(disaggregate="allowed"))
    chat = planned(documents(disaggregate="allowed", demand=short, slo=Objective()))

    assert set(roles(free)) == {"prefill", "decode"}
    assert free.cost_per_hour < whole.cost_per_hour
    assert set(roles(chat)) == {"whole"}


def test_always_takes_roles_though_they_cost_more() -> None:
    short = documents(demand=Demand(requests_per_s=1.0), slo=Objective())

    forced, free = planned(short), planned(short.model_copy(update={"disaggregate": "allowed"}))

    assert set(roles(forced)) == {"prefill", "decode"}
    assert set(roles(free)) == {"whole"}
    assert forced.cost_per_hour > free.cost_per_hour


def test_a_slow_network_keeps_roles_apart_from_a_fast_answer() -> None:
    slow = Links(intra="nvlink", inter_gbps=1)
    pools = tuple(pool.model_copy(update={"links": slow}) for pool in POOLS)

    plan = planned(pools=pools)

    (unmet,) = plan.unmet
    assert unmet.constraint.startswith("handover-too-slow: ")
    assert "disaggregate: allowed" in unmet.cheapest_relaxation
    assert plan.variants == ()


def test_prompts_that_are_short_or_cached_are_read_where_they_are_answered() -> None:
    long = TokenLengths(mean=8000)
    for demand in (
        Demand(requests_per_s=4.0, input_tokens=TokenLengths(mean=400)),
        Demand(requests_per_s=4.0, input_tokens=long, prefix_hit=0.95),
    ):
        (unmet,) = planned(documents(demand=demand)).unmet
        free = planned(documents(demand=demand, disaggregate="allowed"))

        assert unmet.constraint.startswith("handover-does-not-pay: a usual prompt has 400 tokens")
        assert set(roles(free)) == {"whole"}


def test_a_slower_network_never_costs_less() -> None:
    def cost(gbps: float) -> float:
        links = Links(intra="nvlink", inter_gbps=gbps)
        plan = planned(
            documents(), pools=tuple(pool.model_copy(update={"links": links}) for pool in POOLS)
        )
        return plan.cost_per_hour if not plan.unmet else float("inf")

    costs = [cost(gbps) for gbps in (800, 100, 40, 20)]

    assert costs == sorted(costs)


def test_latent_attention_is_not_handed_over_between_generations() -> None:
    large = documents(
        1.0, model="mistral-large-3", max_num_seqs=32, slo=Objective(), precision=("nvfp4",)
    )

    plan = planned(large, pools=(H100.model_copy(update={"nodes": 1}), A100))
    between = [entry for entry in plan.rejected if entry.rule == "handover-needs-one-kernel"]

    assert between
    assert "FLASH_ATTN_MLA" in between[0].reason
    assert len({variant.pool for variant in plan.variants}) == 1


def test_sides_may_share_a_pool_or_one_node() -> None:
    plan = planned(documents(1.0), pools=(a_pool("h100", nodes=1, links=LINKS),))

    side = roles(plan)
    assert side["prefill"].pool == side["decode"].pool == "h100"
    assert plan.unmet == ()


def test_too_few_replicas_are_told_with_the_number_that_suffices() -> None:
    plan = planned(documents(40.0, replicas=ReplicaBounds(max=4)))

    (unmet,) = plan.unmet
    wanted = int(unmet.cheapest_relaxation.removeprefix("replicas.max: "))
    more = documents(40.0, replicas=ReplicaBounds(max=wanted))
    roomy = tuple(pool.model_copy(update={"nodes": 20}) for pool in POOLS)
    assert "replicas.max is 4" in unmet.constraint
    assert not planned(more, pools=roomy).unmet


def test_too_few_gpus_are_told_for_either_side() -> None:
    one = a_pool("h100", nodes=1, gpus_per_node=2, links=LINKS)

    (unmet,) = planned(documents(20.0), pools=(one,)).unmet

    assert "for prefill on pool h100" in unmet.constraint
    assert "for decode on pool h100" in unmet.constraint
    assert "more GPUs in pool h100" in unmet.cheapest_relaxation


def test_bounds_add_up_and_roles_may_grow_as_they_are() -> None:
    side = roles(planned(documents(8.0, replicas=ReplicaBounds(min=2, max=24))))
    prefill, decode = side["prefill"], side["decode"]

    assert prefill.bounds.max + decode.bounds.max == 24
    assert decode.bounds.min == 2
    assert 1 <= prefill.bounds.min <= prefill.replicas
    ratio = prefill.replicas / (prefill.replicas + decode.replicas)
    assert prefill.bounds.max == pytest.approx(24 * ratio, abs=1.0)


def test_whole_replicas_may_stand_beside_and_share_the_bounds() -> None:
    plan = planned(documents(6.0, disaggregate="allowed"))

    side = roles(plan)
    assert set(side) == {"whole", "prefill", "decode"}
    assert requests_per_s_of(plan.variants) >= 6.0
    assert carried(side["whole"]) < 6.0
    assert sum(variant.bounds.max for variant in plan.variants) == 24
    assert sum(v.bounds.min for v in plan.variants if v.role != "prefill") == 1
    total = requests_per_s_of(plan.variants)
    assert side["whole"].predicted.utilization == pytest.approx(6.0 / total)
    assert max(v.predicted.utilization for v in plan.variants) == pytest.approx(6.0 / total)


def test_slower_engines_that_keep_no_promise_leave_no_pair() -> None:
    idle = documents(0.01, tensor_parallel_size=2, pools=("a100",))
    alone = roles(planned(idle))["decode"].predicted.tpot_p95_ms
    tight = idle.model_copy(update={"slo": Objective(tpot_p95_ms=1.1 * alone)})

    usual, careful = planned(tight, robust="off"), planned(tight, robust="require")

    assert not usual.unmet
    (unmet,) = careful.unmet
    assert "service level" in unmet.constraint


def test_without_need_a_model_keeps_both_sides_at_zero() -> None:
    wish = documents(0.0, replicas=ReplicaBounds(min=0, max=8))
    side = roles(planned(wish))

    assert set(side) == {"prefill", "decode"}
    assert all(variant.replicas == 0 for variant in side.values())
    assert all(variant.bounds.min == 0 for variant in side.values())


def test_the_same_plan_again_changes_nothing() -> None:
    plan = planned()

    assert changes(plan, planned(running=plan)) == ()


def test_more_demand_only_adds_replicas() -> None:
    before = planned(documents(3.0, tensor_parallel_size=2))
    after = planned(documents(6.0, tensor_parallel_size=2), running=before)

    found = changes(before, after)

    assert found
    assert all(isinstance(change, Resize) and change.before < change.after for change in found)
    for role, variant in roles(before).items():
        assert set(variant.placement) <= set(roles(after)[role].placement)


def test_on_the_way_to_roles_a_model_carries_what_it_promised() -> None:
    before = planned(documents(disaggregate="never"))
    after = planned(documents(), running=before)

    moved = migration(before, after)
    (model,) = moved.models

    assert moved.reduced_capacity_s == 0
    assert model.requests_per_s_after == pytest.approx(requests_per_s_of(after.variants))
    assert [change.kind for change in moved.changes if isinstance(change, Create)]
    assert moved.changes[-1].kind == "delete"


def test_a_node_of_either_side_is_a_loss_and_can_be_carried() -> None:
    pools = tuple(pool.model_copy(update={"nodes": 6, "gpus_per_node": 2}) for pool in POOLS)
    demands = {"documents": 4.0}

    usual = planned(pools=pools)
    safe = planned(pools=pools, carry_node_loss=True)

    (lost,) = losses(usual.variants, demands)
    assert lost.left < 4.0
    assert lost.left == pytest.approx(_left_without(usual, lost.node))
    assert safe.unmet == ()
    nodes = {n.node for v in safe.variants for replica in v.placement for n in replica}
    assert all(_left_without(safe, node) >= 4.0 * (1 - 1e-6) for node in nodes)
    assert all(variant.replicas >= 2 for variant in safe.variants)


def _left_without(plan: Plan, node: str) -> float:
    sides: defaultdict[str, float] = defaultdict(float)
    for variant in plan.variants:
        there = sum(all(entry.node != node for entry in each) for each in variant.placement)
        sides[variant.role] += there * variant.capacity_requests_per_s
    return sides["whole"] + min(sides["prefill"], sides["decode"])


def test_a_plan_that_must_hold_when_engines_are_slower_has_more_of_both() -> None:
    wish = documents(tensor_parallel_size=4)
    usual, careful = planned(wish, robust="off"), planned(wish, robust="require")

    assert careful.unmet == ()
    assert careful.cost_per_hour >= usual.cost_per_hour
    for role in ("prefill", "decode"):
        assert (
            roles(careful)[role].capacity_requests_per_s
            < roles(usual)[role].capacity_requests_per_s
        )


@pytest.mark.parametrize("mode", ["allowed", "always"])
def test_an_explanation_tells_what_the_other_way_would_cost(mode: str) -> None:
    fleet = a_fleet(documents(disaggregate=mode))
    inventory = an_inventory(*POOLS)
    plan = make_plan(fleet, inventory, CATALOGUE)

    (reason,) = explain(fleet, inventory, CATALOGUE, plan).reasons

    assert reason.chosen[0].startswith("decode: ")
    assert reason.roles is not None
    assert reason.roles.startswith("a prefill replica reads ")
    if mode == "allowed":
        whole = planned(documents(disaggregate="never")).cost_per_hour
        assert f"{whole - plan.cost_per_hour:+.2f} USD/h" in reason.roles
    else:
        assert "not all needs could be met" in reason.roles


def test_an_explanation_says_why_there_are_no_roles() -> None:
    dearer = documents(disaggregate="allowed", demand=Demand(requests_per_s=1.0), slo=Objective())
    slow = tuple(
        pool.model_copy(update={"links": Links(intra="nvlink", inter_gbps=1)}) for pool in POOLS
    )

    def told(wish: FleetModel, pools: tuple[Pool, ...]) -> str | None:
        fleet, inventory = a_fleet(wish), an_inventory(*pools)
        plan = make_plan(fleet, inventory, CATALOGUE)
        return explain(fleet, inventory, CATALOGUE, plan).reasons[0].roles

    assert (told(dearer, POOLS) or "").startswith("not chosen: prefill: 1 x ")
    assert (told(documents(disaggregate="allowed"), slow) or "").startswith("not possible: ")
    assert told(documents(disaggregate="never"), POOLS) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ("engine: llamacpp, disaggregate: allowed", "means nothing to engine 'llamacpp'"),
        ("disaggregate: always", "at least two replicas"),
        (
            "disaggregate: allowed, replicas: {max: 4}, canary: {weight: 0.1, revision: next}",
            "beside a canary",
        ),
        ("engine_args: ['--kv-transfer-config={}']", "use disaggregate"),
    ],
)
def test_a_wish_that_cannot_be_is_an_error(changes: str, told: str) -> None:
    text = f"{{fleet: demo, models: [{{name: chat, model: nano, {changes}}}]}}"

    with pytest.raises(ConfigError, match=told):
        parse_yaml(text, FleetSpec, source="fleet.yaml")


def test_simulated_engines_take_roles_on_a_machine_without_gpus() -> None:
    pool = Pool(
        name="local", gpu="cpu", gpus_per_node=8, memory_gib_per_gpu=2, kv_cache_gib_per_gpu=1
    )

    plan = planned(documents(1.0, engine="sim", slo=Objective()), pools=(pool,))

    assert set(roles(plan)) == {"prefill", "decode"}
    assert plan.unmet == ()


@settings(deadline=None, max_examples=25)
@given(
    rate=st.sampled_from([0.3, 2.0, 9.0]),
    prompt=st.sampled_from([300.0, 4000.0, 12000.0]),
    ttft_s=st.sampled_from([None, 2.0, 8.0]),
    nodes=st.integers(1, 3),
    mode=st.sampled_from(["allowed", "always"]),
    objective=st.sampled_from(["cost", "throughput", "headroom"]),
)
def test_roles_never_take_more_than_there_is_nor_lose_by_a_node_more(
    *,
    rate: float,
    prompt: float,
    ttft_s: float | None,
    nodes: int,
    mode: Any,
    objective: Any,
) -> None:
    demand = Demand(requests_per_s=rate, input_tokens=TokenLengths(mean=prompt))
    wish = documents(
        disaggregate=mode,
        demand=demand,
        slo=Objective(ttft_p95_s=ttft_s, tpot_p95_ms=40),
        replicas=ReplicaBounds(max=8),
    )

    def solved(number: int) -> Plan:
        pools = (
            a_pool("h100", nodes=number, gpus_per_node=4, links=LINKS),
            a_pool("a100", "A100-80-SXM", gpus_per_node=2, links=LINKS),
        )
        fleet = a_fleet(wish, objective=objective, robust="off")
        return make_plan(fleet, an_inventory(*pools), CATALOGUE, limits=Limits(gap=0.0))

    plan, more = solved(nodes), solved(nodes + 1)

    taken = [
        (node.node, gpu)
        for variant in plan.variants
        for replica in variant.placement
        for node in replica
        for gpu in node.gpus
    ]
    assert len(taken) == len(set(taken)) <= 4 * nodes + 2
    assert sum(variant.replicas for variant in plan.variants) <= 8
    side = roles(plan)
    assert ("prefill" in side) == ("decode" in side)
    if not plan.unmet:
        assert requests_per_s_of(plan.variants) >= rate * (1 - 1e-5)
        assert not more.unmet
        assert more.objective <= plan.objective + 1e-5 * abs(plan.objective) + 1e-9


@settings(deadline=None, max_examples=10)
@given(
    rates=st.lists(st.sampled_from([0.5, 3.0, 8.0]), min_size=1, max_size=2),
    later=st.sampled_from([0.5, 1.0, 2.0]),
    mode=st.sampled_from(["allowed", "always"]),
    robust=st.sampled_from(["off", "prefer", "require"]),
)
def test_planning_again_moves_nothing_and_a_change_of_load_keeps_its_promises(
    rates: list[float], later: float, mode: Any, robust: Any
) -> None:
    def wishes(factor: float) -> list[FleetModel]:
        return [
            documents(rate * factor, name=f"documents{at}", disaggregate=mode)
            for at, rate in enumerate(rates)
        ]

    plan = planned(*wishes(1.0), robust=robust)
    again = planned(*wishes(1.0), robust=robust, running=plan)
    other = planned(*wishes(later), robust=robust, running=plan)

    if not plan.unmet:
        assert changes(plan, again) == ()
    if not plan.unmet and not other.unmet:
        taken = {
            (node.node, gpu)
            for variant in other.variants
            for replica in variant.placement
            for node in replica
            for gpu in node.gpus
        }
        assert len(taken) == other.gpus_used
        for model in migration(plan, other).models:
            demand = later * rates[int(model.model[-1])]
            assert model.requests_per_s_after >= demand * (1 - 1e-5)


@settings(deadline=None, max_examples=20)
@given(
    rate=st.sampled_from([0.3, 2.0, 9.0]),
    prompt=st.sampled_from([300.0, 4000.0, 12000.0]),
    ttft_s=st.sampled_from([None, 2.0, 8.0]),
    gbps=st.sampled_from([10, 100, 400]),
    objective=st.sampled_from(["cost", "throughput", "headroom"]),
)
def test_to_allow_roles_is_never_worse_than_either_to_forbid_or_to_force_them(
    *, rate: float, prompt: float, ttft_s: float | None, gbps: int, objective: Any
) -> None:
    links = Links(intra="nvlink", inter_gbps=gbps)
    pools = (
        a_pool("h100", gpus_per_node=4, links=links),
        a_pool("a100", "A100-80-SXM", nodes=2, gpus_per_node=2, links=links),
    )

    def solved(mode: Any) -> Plan:
        wish = documents(
            disaggregate=mode,
            demand=Demand(requests_per_s=rate, input_tokens=TokenLengths(mean=prompt)),
            slo=Objective(ttft_p95_s=ttft_s, tpot_p95_ms=40),
            replicas=ReplicaBounds(max=8),
        )
        fleet = a_fleet(wish, objective=objective, robust="off")
        return make_plan(fleet, an_inventory(*pools), CATALOGUE, limits=Limits(gap=0.0))

    free = solved("allowed")

    for other in (solved("never"), solved("always")):
        if not other.unmet:
            assert not free.unmet
            assert free.objective <= other.objective + 1e-5 * abs(other.objective) + 1e-9
