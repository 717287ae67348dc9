from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from placement.greedy import first_answer
from placement.milp import Limits
from placement.problem import Column, Need, Nodes, Problem, score
from placement.selection import select
from tests.placement.brute_force import a_problem, best_of_all, fewest_short, fits

LIMITS = Limits()


@pytest.mark.parametrize("seed", range(200))
def test_a_small_problem_is_solved_as_well_as_by_trying_everything(seed: int) -> None:
    problem = a_problem(Random(seed), models=1 + seed % 3, groups=1 + seed % 2, most=2)

    found = select(problem, LIMITS)
    best = best_of_all(problem)

    assert fits(problem, found.counts)
    assert problem.meets(found.counts) == (best is not None)
    if best is not None:
        assert found.objective == pytest.approx(best, rel=1e-5, abs=1e-5)
        assert found.objective == score(problem, found.counts)
    assert found.bound == pytest.approx(found.objective, rel=1e-5)


@pytest.mark.parametrize("seed", range(60))
def test_where_not_all_can_be_served_as_few_as_possible_go_short(seed: int) -> None:
    problem = a_problem(Random(seed), models=3, groups=1, most=4)

    counts = select(problem, LIMITS).counts

    assert fits(problem, counts)
    short = sum(not problem.met(counts, model) for model in range(3))
    assert short == fewest_short(problem)


@pytest.mark.parametrize("seed", range(50))
def test_a_larger_problem_is_solved_to_within_one_percent(seed: int) -> None:
    problem = a_problem(Random(seed), models=8, groups=4, most=40)
    problem = replace(problem, groups=tuple(replace(g, nodes=30) for g in problem.groups))

    found = select(problem, Limits(time_s=10))

    assert math.isfinite(found.objective)
    assert found.objective - found.bound <= 0.01 * abs(found.objective)


@pytest.mark.parametrize("objective", ["cost", "throughput", "headroom"])
def test_without_time_there_is_still_an_answer_with_an_honest_bound(objective: str) -> None:
    for seed in range(20):
        problem = a_problem(Random(seed), models=3, groups=2, most=8, objective=objective)
        best = select(problem, LIMITS)
        if not problem.meets(best.counts):
            continue

        hasty = select(problem, Limits(time_s=0.0))

        assert problem.meets(hasty.counts) or not problem.meets(first_answer(problem))
        assert hasty.bound <= best.objective + 1e-6 * abs(best.objective)
        assert hasty.bound <= hasty.objective


def test_the_greedy_answer_counts_what_runs_among_the_most_replicas() -> None:
    spot = Column(model=0, group=0, gpus=1, rate=2.0, price=1.0, spot=True, running=1, move=1.0)
    firm = Column(model=0, group=0, gpus=1, rate=2.0, price=2.0, move=1.0)
    need = Need(rate=4.5, least=1, most=2, firm_rate=2.5)
    problem = Problem(columns=(spot, firm), needs=(need,), groups=(Nodes(1, 8),))

    assert sum(first_answer(problem)) <= 2


def test_a_replica_over_two_groups_takes_places_in_both() -> None:
    both = Column(model=0, group=0, gpus=2, rate=1.0, price=3.0, beside=((1, 1),))
    need = Need(rate=3.0, least=1, most=8)
    groups = (Nodes(4, 2), Nodes(1, 3))

    found = select(Problem(columns=(both,), needs=(need,), groups=groups), LIMITS)

    assert found.counts == (3,)
    short = Problem(columns=(both,), needs=(need,), groups=(Nodes(4, 2), Nodes(1, 2)))
    assert select(short, LIMITS).counts == (2,)


def test_the_greedy_answer_keeps_what_runs_and_adds_what_lacks() -> None:
    runs = Column(model=0, group=0, gpus=2, rate=5.0, price=9.0, running=2, move=1.0)
    cheaper = Column(model=0, group=0, gpus=2, rate=5.0, price=8.5, move=1.0)
    need = Need(rate=15.0, least=1, most=8)
    problem = Problem(columns=(cheaper, runs), needs=(need,), groups=(Nodes(2, 8),))

    assert first_answer(problem) == (1, 2)
    assert select(problem, LIMITS).counts == (1, 2)


def test_for_most_headroom_what_runs_stays_where_it_is_as_good() -> None:
    """Two ways to carry as much: also in a large program, which is not solved to the end."""
    random = Random(1)
    columns = [
        Column(model=model, group=0, gpus=1, rate=2.0, price=5.0, tie=random.random(), move=0.01)
        for model in range(60)
        for _ in range(2)
    ]
    running = [replace(each, running=index % 2) for index, each in enumerate(columns)]
    problem = Problem(
        columns=tuple(running),
        needs=(Need(rate=1.0, least=1, most=1),) * 60,
        groups=(Nodes(8, 8),),
        objective="headroom",
    )

    assert select(problem, Limits()).counts == tuple(each.running for each in running)
