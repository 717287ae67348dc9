from __future__ import annotations

import pytest

from placement.explain import explain
from placement.explanation import Explanation
from placement.fleet import Demand, FleetModel, Objective, ReplicaBounds
from placement.inventory import Pool
from placement.planner import make_plan
from tests.placement.builders import CATALOGUE, a_fleet, a_pool, a_wish, an_inventory


def explained(*wishes: FleetModel, pools: tuple[Pool, ...], **changes: object) -> Explanation:
    fleet, inventory = a_fleet(*wishes, **changes), an_inventory(*pools)
    return explain(fleet, inventory, CATALOGUE, make_plan(fleet, inventory, CATALOGUE))


def chat(rate: float, **changes: object) -> FleetModel:
    fields: dict[str, object] = {
        "demand": Demand(requests_per_s=rate),
        "replicas": ReplicaBounds(min=1, max=16),
        "max_model_len": 8192,
    }
    return a_wish("chat", "mistral-small-3.2", **{**fields, **changes})


def test_the_runner_up_is_the_best_plan_without_what_was_chosen() -> None:
    both = (a_pool("a100", "A100-80-SXM"), a_pool("h100"))
    wish = chat(2, tensor_parallel_size=1)
    found = explained(wish, pools=both)

    (reason,) = found.reasons
    only = make_plan(a_fleet(wish), an_inventory(a_pool("h100")), CATALOGUE)
    cheapest = make_plan(a_fleet(wish), an_inventory(*both), CATALOGUE)
    assert "pool a100" in reason.chosen[0]
    assert reason.runner_up is not None
    assert "pool h100" in reason.runner_up
    assert reason.runner_up_costs == only.cost_per_hour - cheapest.cost_per_hour


def test_with_one_way_to_run_a_model_there_is_no_runner_up() -> None:
    (reason,) = explained(chat(1, tensor_parallel_size=1), pools=(a_pool(),)).reasons

    assert reason.runner_up is None


def test_a_promise_that_limits_a_replica_is_named_else_its_engine() -> None:
    strict = explained(chat(2, slo=Objective(tpot_p95_ms=40)), pools=(a_pool(),))
    free = explained(chat(2), pools=(a_pool(),))

    assert "tpot_p95_ms 40" in strict.reasons[0].binding
    assert "requests at once" in free.reasons[0].binding


def test_another_node_of_the_cheaper_kind_is_priced() -> None:
    cheap = a_pool("a100", "A100-80-SXM", gpus_per_node=2)
    found = explained(chat(20, tensor_parallel_size=1), pools=(cheap, a_pool("h100")))

    (priced,) = [each for each in found.what_if if "pool a100" in each.change]
    assert priced.cost_per_hour is not None
    assert priced.cost_per_hour < 0
    assert priced.effect.startswith("saves ")


def test_a_promise_twice_as_strict_is_priced_or_out_of_reach() -> None:
    slo = Objective(tpot_p95_ms=40)
    found = explained(chat(20, slo=slo), pools=(a_pool(nodes=2),))
    hard = explained(chat(2, slo=Objective(tpot_p95_ms=8)), pools=(a_pool(),))

    changes = {each.change: each for each in found.what_if}
    assert changes["chat: TPOT p95 of 20 ms instead of 40 ms"].gpus > 0
    (beyond,) = [each for each in hard.what_if if "4 ms instead of 8 ms" in each.change]
    assert beyond.effect == "is more than these pools can do"


def test_ways_out_of_a_fleet_that_does_not_fit_do_let_it_fit() -> None:
    wish = chat(30, tensor_parallel_size=1, slo=Objective(tpot_p95_ms=40))
    found = explained(wish, pools=(a_pool(gpus_per_node=2),))

    (nodes,) = [way for way in found.ways_out if "node" in way.change]
    number = int(nodes.change.split()[0])
    less, enough = (
        make_plan(a_fleet(wish), an_inventory(a_pool(gpus_per_node=2, nodes=1 + more)), CATALOGUE)
        for more in (number - 1, number)
    )
    assert less.unmet
    assert not enough.unmet
    assert nodes.cost_per_hour == enough.cost_per_hour
    assert any("of the demand of chat" in way.change for way in found.ways_out)


def test_the_demand_that_would_fit_is_told_to_some_percent() -> None:
    wish = chat(30, tensor_parallel_size=1, slo=Objective(tpot_p95_ms=40))
    pool = a_pool(gpus_per_node=2)

    ways = explained(wish, pools=(pool,)).ways_out

    (way,) = [each.change for each in ways if "of the demand of chat" in each.change]
    share = int(way.split()[0]) / 100
    for part, fits in ((share, True), (1.12 * share, False)):
        less = wish.model_copy(update={"demand": Demand(requests_per_s=30 * part)})
        assert bool(make_plan(a_fleet(less), an_inventory(pool), CATALOGUE).unmet) is not fits


def test_reasons_count_what_the_loss_of_a_node_takes() -> None:
    """The runner-up and another node are priced against the plan that carries a loss."""
    wish = chat(4, tensor_parallel_size=1)
    pools = (a_pool("a100", "A100-80-SXM", nodes=1, gpus_per_node=2), a_pool("h100", nodes=2))
    found = explained(wish, pools=pools, carry_node_loss=True)

    fleet = a_fleet(wish, carry_node_loss=True)
    now = make_plan(fleet, an_inventory(*pools), CATALOGUE)
    for each in found.what_if:
        if each.change.startswith("one more node in pool a100"):
            larger = (pools[0].with_more_nodes(1), pools[1])
            then = make_plan(fleet, an_inventory(*larger), CATALOGUE)
            assert each.cost_per_hour == pytest.approx(then.cost_per_hour - now.cost_per_hour)
            break
    else:
        pytest.fail("another node of the cheap pool saves something")
