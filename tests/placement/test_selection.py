from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from placement.milp import Limits
from placement.problem import score
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
