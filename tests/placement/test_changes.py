from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.changes import changes, migration
from placement.fleet import Demand, FleetModel, ReplicaBounds
from placement.inventory import Pool
from placement.migration import Change, Create, Delete, Migration, Replace, Resize
from placement.plan import Plan
from placement.planner import make_plan
from placement.spec import dump_yaml, parse_yaml
from tests.placement.builders import CATALOGUE, a_fleet, a_pool, a_wish, an_inventory

POOLS = (a_pool("h100", nodes=2), a_pool("a100", "A100-80-SXM", nodes=2))


def a_chat(rate: float, **changes: Any) -> FleetModel:
    fields: dict[str, Any] = {
        "demand": Demand(requests_per_s=rate),
        "replicas": ReplicaBounds(min=1, max=16),
        "max_model_len": 8192,
        "tensor_parallel_size": 2,
        "pools": ("h100",),
    }
    return a_wish("chat", "mistral-small-3.2", **{**fields, **changes})


def planned(
    *wishes: FleetModel, running: Plan | None = None, pools: tuple[Pool, ...] = POOLS
) -> Plan:
    return make_plan(a_fleet(*wishes), an_inventory(*pools), CATALOGUE, running=running)


def kinds(found: tuple[Change, ...]) -> list[str]:
    return [change.kind for change in found]


def test_the_same_plan_changes_nothing() -> None:
    plan = planned(a_chat(20))

    assert changes(plan, planned(a_chat(20), running=plan)) == ()


def test_a_first_plan_creates_everything() -> None:
    plan = planned(a_chat(20))

    (change,) = changes(Plan.empty(), plan)

    assert isinstance(change, Create)
    assert change.replicas == plan.variants[0].replicas
    weights = plan.variants[0].shape.per_gpu.weights_bytes
    assert change.bytes_to_load == change.replicas * 2 * weights
    assert change.cost_per_hour == pytest.approx(plan.cost_per_hour)
    assert change.reduced_capacity_s == 0


def test_more_demand_only_adds_replicas() -> None:
    before = planned(a_chat(20))
    after = planned(a_chat(60), running=before)

    (change,) = changes(before, after)

    assert isinstance(change, Resize)
    assert change.before < change.after
    assert set(before.variants[0].placement) <= set(after.variants[0].placement)


def test_less_demand_only_removes_replicas_and_loads_nothing() -> None:
    before = planned(a_chat(60))

    (change,) = changes(before, planned(a_chat(20), running=before))

    assert isinstance(change, Resize)
    assert change.before > change.after
    assert change.bytes_to_load == 0
    assert change.cost_per_hour < 0


def test_another_pool_starts_before_the_old_one_stops() -> None:
    before = planned(a_chat(20))

    found = changes(before, planned(a_chat(20, pools=("a100",)), running=before))

    assert kinds(found) == ["create", "delete"]
    assert all(change.reduced_capacity_s == 0 for change in found)


def test_a_model_that_is_gone_is_deleted() -> None:
    before = planned(a_chat(20))

    found = changes(before, planned(a_wish("other", "mistral-7b"), running=before))

    assert kinds(found) == ["create", "delete"]
    assert isinstance(found[1], Delete)


def test_a_model_that_is_gone_promises_nothing_whatever_its_rates_add_up_to() -> None:
    """0.7 + 0.7 + 0.7 - 0.7 - 0.7 - 0.7 is less than nothing in floating point."""
    pools, three = (a_pool("h100", gpus_per_node=4),), ReplicaBounds(min=3, max=3)
    old = a_wish("old", "mistral-7b", tensor_parallel_size=1, replicas=three)
    before = planned(old, pools=pools)
    rates = [each.model_copy(update={"capacity_requests_per_s": 0.7}) for each in before.variants]
    before = before.model_copy(update={"variants": tuple(rates)})
    new = a_wish("new", "mistral-small-3.2", tensor_parallel_size=2)

    found = changes(before, planned(new, new.model_copy(update={"name": "too"}), pools=pools))

    assert all(change.reduced_capacity_s == 0 for change in found)


def test_another_context_replaces_replicas_and_says_why() -> None:
    before = planned(a_chat(20))

    (change,) = changes(before, planned(a_chat(20, max_model_len=16384), running=before))

    assert isinstance(change, Replace)
    assert change.why == "max_model_len 8192 -> 16384"
    assert change.reduced_capacity_s == 0  # free GPUs take the new ones first


def test_without_a_free_gpu_the_time_of_reduced_capacity_is_told() -> None:
    pools = (a_pool("h100", gpus_per_node=2),)
    before = planned(a_chat(5), pools=pools)

    (change,) = changes(before, planned(a_chat(5, max_model_len=4096), running=before, pools=pools))

    assert change.reduced_capacity_s == change.load_s > 60


def test_a_replica_that_gives_way_to_another_shape_is_missed_until_that_serves() -> None:
    pools = (a_pool("h100", gpus_per_node=2),)
    before = planned(a_chat(5), pools=pools)

    wanted = planned(a_chat(5, tensor_parallel_size=1), running=before, pools=pools)
    stop, start = changes(before, wanted)

    assert kinds((stop, start)) == ["delete", "create"]
    assert stop.reduced_capacity_s == start.load_s > 60
    assert start.reduced_capacity_s == 0


def test_a_small_change_of_demand_does_not_reshuffle_the_fleet() -> None:
    wishes = [
        a_wish(name, "mistral-7b", demand=Demand(requests_per_s=8), replicas=ReplicaBounds(max=8))
        for name in "abcd"
    ]
    before = planned(*wishes)
    more = [wish.model_copy(update={"demand": Demand(requests_per_s=8.2)}) for wish in wishes]

    assert changes(before, planned(*more, running=before)) == ()


def test_a_migration_tells_each_model_before_and_after_and_survives_yaml() -> None:
    before = planned(a_chat(20))
    moved = migration(before, planned(a_chat(20, pools=("a100",)), running=before))

    (model,) = moved.models
    assert model.tpot_p95_ms_before is not None
    assert model.tpot_p95_ms_after is not None
    assert moved.cost_per_hour_before == pytest.approx(before.cost_per_hour)
    assert moved.bytes_to_load > 0
    assert parse_yaml(dump_yaml(moved), Migration, source="migration") == moved


@settings(deadline=None, max_examples=40)
@given(
    rates=st.lists(st.floats(1, 60), min_size=2, max_size=2),
    pools=st.lists(st.sampled_from([("h100",), ("a100",), None]), min_size=2, max_size=2),
)
def test_no_step_falls_below_what_both_plans_promise_unless_it_is_told(
    rates: list[float], pools: list[tuple[str, ...] | None]
) -> None:
    before = planned(a_chat(rates[0], pools=pools[0]))
    after = planned(a_chat(rates[1], pools=pools[1]), running=before)
    rate = {v.variant: v.capacity_requests_per_s for v in (*before.variants, *after.variants)}
    replicas = defaultdict(int, {v.variant: v.replicas for v in before.variants})

    for change in changes(before, after):
        if isinstance(change, Create):
            replicas[change.variant] += change.replicas
        elif isinstance(change, Delete):
            replicas[change.variant] -= change.replicas
        elif isinstance(change, Resize):
            assert replicas[change.variant] == change.before
            replicas[change.variant] = change.after
        carried = sum(count * rate[name] for name, count in replicas.items())
        assert carried >= 0.999 * min(rates) or change.reduced_capacity_s or before.unmet

    assert {name: count for name, count in replicas.items() if count} == {
        variant.variant: variant.replicas for variant in after.variants
    }
