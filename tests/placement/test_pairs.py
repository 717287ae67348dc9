"""Prefill and decode replicas in the integer program, against trying everything."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Literal

import pytest

from placement.greedy import first_answer
from placement.milp import Limits
from placement.problem import Column, Need, Nodes, Problem, score
from placement.selection import best_without_limits, select
from tests.placement.brute_force import a_problem, best_of_all, fewest_short, fits, with_pairs

LIMITS = Limits()


def a_small_problem(seed: int) -> Problem:
    random = Random(seed)
    problem = a_problem(random, models=1 + seed % 2, groups=1 + seed % 2, most=3)
    return with_pairs(random, problem, most=1 + seed % 2)


def sides(
    prefill: float, decode: float, *, pair: int = 0, price: float = 1.0, **changes: object
) -> tuple[Column, Column]:
    """Two columns of one GPU each, on one group."""
    fields: dict[str, object] = {"model": 0, "group": 0, "gpus": 1, "price": price, "pair": pair}
    return (
        Column(rate=prefill, role="prefill", **{**fields, **changes}),  # type: ignore[arg-type]
        Column(rate=decode, role="decode", **{**fields, **changes}),  # type: ignore[arg-type]
    )


def a_question(
    *columns: Column,
    rate: float,
    most: int = 8,
    gpus: int = 8,
    least: int = 0,
    objective: Literal["cost", "throughput", "headroom"] = "cost",
) -> Problem:
    return Problem(
        columns=columns,
        needs=(Need(rate=rate, least=least, most=most),),
        groups=(Nodes(nodes=1, gpus_per_node=gpus),),
        objective=objective,
    )


@pytest.mark.parametrize("seed", range(120))
def test_a_small_problem_with_roles_is_solved_as_well_as_by_trying_everything(seed: int) -> None:
    problem = a_small_problem(seed)

    found = select(problem, LIMITS)
    best = best_of_all(problem)

    assert fits(problem, found.counts)
    assert problem.meets(found.counts) == (best is not None)
    if best is not None:
        assert found.objective == pytest.approx(best, rel=1e-5, abs=1e-5)
        assert found.objective == score(problem, found.counts)
    assert found.bound == pytest.approx(found.objective, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(60))
def test_what_a_lost_node_must_leave_is_left_on_both_sides(seed: int) -> None:
    random, problem = Random(seed), a_small_problem(seed)
    needs = tuple(
        replace(
            need,
            rate_after_loss=random.choice([0, 0.3, 0.7]) * need.rate,
            replicas_after_loss=random.choice([0, 0, 1]),
        )
        for need in problem.needs
    )
    problem = replace(problem, needs=needs)

    found, best = select(problem, LIMITS), best_of_all(problem)

    assert fits(problem, found.counts)
    assert problem.meets(found.counts) == (best is not None)
    if best is not None:
        assert found.objective == pytest.approx(best, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_where_not_all_can_be_served_as_few_as_possible_go_short_in_roles_too(seed: int) -> None:
    random = Random(seed)
    problem = with_pairs(random, a_problem(random, models=2, groups=1, most=3), most=1)

    counts = select(problem, LIMITS).counts

    assert fits(problem, counts)
    assert sum(not problem.met(counts, model) for model in range(2)) == fewest_short(problem)


@pytest.mark.parametrize("seed", range(120))
def test_the_greedy_answer_fits_and_no_bound_is_above_the_best(seed: int) -> None:
    problem = a_small_problem(seed)
    best = best_of_all(problem)

    counts = first_answer(problem)

    assert fits(problem, counts)
    assert all(
        problem.fits_roles(counts, model) and problem.engines(counts, model) <= need.most
        for model, need in enumerate(problem.needs)
    )
    if best is not None:
        assert best_without_limits(problem) <= best + 1e-9


def test_each_side_gets_as_many_replicas_as_the_demand_takes() -> None:
    problem = a_question(*sides(prefill=6.0, decode=2.0), rate=10.0)

    assert select(problem, LIMITS).counts == (2, 5)


def test_capacity_of_one_side_alone_is_worth_nothing() -> None:
    problem = a_question(*sides(prefill=6.0, decode=2.0), rate=10.0)

    assert problem.rate((5, 1), 0) == 2.0
    assert problem.rate((1, 0), 0) == 0.0
    assert problem.replicas((5, 1), 0) == 1
    assert problem.engines((5, 1), 0) == 6
    assert not problem.met((0, 5), 0)


def test_whole_replicas_stand_beside_a_pair_where_that_is_cheapest() -> None:
    whole = Column(model=0, group=0, gpus=1, rate=1.0, price=0.9)
    problem = a_question(whole, *sides(prefill=4.0, decode=4.0), rate=5.0)

    assert select(problem, LIMITS).counts == (1, 1, 1)


def test_with_equal_cost_whole_replicas_are_preferred() -> None:
    whole = Column(model=0, group=0, gpus=1, rate=2.0, price=1.0, tie=1.0)
    pair = sides(prefill=4.0, decode=4.0, tie=1.1)
    problem = a_question(whole, *pair, rate=4.0)

    assert select(problem, LIMITS).counts == (2, 0, 0)


def test_of_a_models_pairs_one_is_used() -> None:
    first = sides(prefill=4.0, decode=1.0, pair=0, price=0.5)
    second = sides(prefill=1.0, decode=4.0, pair=1, price=0.6)
    problem = a_question(*first, *second, rate=4.0)

    counts = select(problem, LIMITS).counts

    assert problem.fits_roles(counts, 0)
    assert counts == (1, 4, 0, 0)
    assert not problem.met((1, 0, 0, 1), 0)


def test_the_most_throughput_balances_both_sides() -> None:
    problem = a_question(*sides(prefill=6.0, decode=2.0), rate=1.0, objective="throughput")

    found = select(problem, LIMITS)

    assert found.counts == (2, 6)
    assert found.objective == -12.0


def test_the_most_headroom_balances_both_sides() -> None:
    problem = a_question(*sides(prefill=6.0, decode=2.0), rate=3.0, objective="headroom")

    found = select(problem, LIMITS)

    assert found.counts == (2, 6)
    assert found.objective == pytest.approx(0.25)


def test_a_pair_on_spot_nodes_is_not_firm() -> None:
    prefill, decode = sides(prefill=4.0, decode=4.0)
    problem = a_question(replace(prefill, spot=True), decode, rate=4.0)

    assert problem.rate((1, 1), 0) == 4.0
    assert problem.rate((1, 1), 0, firm_only=True) == 0.0


def test_what_runs_stays_though_another_pair_is_a_little_cheaper() -> None:
    running = sides(prefill=4.0, decode=4.0, pair=0, running=1, move=0.3)
    cheaper = sides(prefill=4.0, decode=4.0, pair=1, price=0.9, move=0.3)
    problem = a_question(*running, *cheaper, rate=4.0)

    assert select(problem, LIMITS).counts == (1, 1, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_a_large_problem_with_roles_is_solved_to_within_three_percent(seed: int) -> None:
    random = Random(seed)
    problem = with_pairs(random, a_problem(random, models=8, groups=4, most=40), most=6)
    problem = replace(problem, groups=tuple(replace(g, nodes=30) for g in problem.groups))

    found = select(problem, Limits(time_s=10))

    assert all(problem.fits_roles(found.counts, model) for model in range(8))
    assert found.objective - found.bound <= 0.03 * abs(found.objective)


@pytest.mark.parametrize("seed", range(40))
def test_a_node_more_never_makes_it_worse_in_roles_either(seed: int) -> None:
    problem = a_small_problem(seed)
    more = tuple(replace(group, nodes=group.nodes + 1) for group in problem.groups)
    larger = replace(problem, groups=more)

    before, after = select(problem, LIMITS), select(larger, LIMITS)

    if problem.meets(before.counts):
        assert problem.meets(after.counts)
        assert after.objective <= before.objective + 1e-5 * abs(before.objective) + 1e-9
