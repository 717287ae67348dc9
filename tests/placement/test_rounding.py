from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from placement.formulation import Formulation
from placement.milp import INFINITY, Limits, Program, Relaxation
from placement.packing import Places
from placement.problem import Column, Need, Nodes, Problem
from placement.rounding import rounded
from placement.selection import select

SIZES = (1, 2, 4, 8)


def a_large_problem(seed: int, **changes: object) -> Problem:
    """20 models on 6 groups of nodes, with demands that fill most of them."""
    random = Random(seed)
    columns = [
        Column(
            model=model,
            group=group,
            gpus=gpus,
            rate=gpus * random.uniform(0.6, 1.4),
            price=gpus * (1 + group) * random.uniform(0.4, 1.1),
            tie=gpus,
        )
        for model in range(20)
        for group in range(6)
        for gpus in random.sample(SIZES, 2)
    ]
    needs = [Need(rate=random.uniform(100, 600), least=1, most=4000) for _ in range(20)]
    problem = Problem(
        columns=tuple(columns), needs=tuple(needs), groups=tuple(Nodes(160, 8) for _ in range(6))
    )
    return replace(problem, **changes)  # type: ignore[arg-type]


def fits(problem: Problem, counts: list[int]) -> bool:
    """Whether replicas of sizes that divide each other fit: the largest first always does it."""
    for group, nodes in enumerate(problem.groups):
        places = Places(nodes.nodes, nodes.gpus_per_node)
        for size in reversed(SIZES):
            wanted = sum(
                count
                for column, count in zip(problem.columns, counts, strict=True)
                if column.group == group and column.gpus == size
            )
            if wanted > places.room(size):
                return False
            places.take(size, wanted)
    return True


@pytest.mark.parametrize("objective", ["cost", "throughput", "headroom"])
@pytest.mark.parametrize("seed", range(10))
def test_a_rounded_relaxation_is_whole_keeps_every_need_and_is_not_far_from_the_best(
    seed: int, objective: str
) -> None:
    problem = a_large_problem(seed, objective=objective)
    form = Formulation(problem)

    point = form.start(None)

    assert point is not None
    counts = [round(value) for value in point[: len(problem.columns)]]
    assert point[: len(counts)] == counts
    assert problem.meets(counts)
    assert fits(problem, counts)
    relaxation = Relaxation(form.program)
    assert relaxation.values is not None
    best = form.program.cost(relaxation.values)
    assert best - 1e-6 <= form.program.cost(point) <= best + 0.2 * abs(best)


@pytest.mark.parametrize("objective", ["cost", "throughput", "headroom"])
def test_a_large_problem_is_solved_within_two_percent_without_a_greedy_answer(
    objective: str,
) -> None:
    problem = a_large_problem(0, objective=objective)

    found = select(problem, Limits(time_s=60))

    assert problem.meets(found.counts)
    assert fits(problem, list(found.counts))
    assert found.objective - found.bound <= 0.02 * abs(found.objective)


def test_where_nothing_is_feasible_rounding_says_so() -> None:
    program = Program()
    one = program.column(1.0, upper=3)
    program.row([(one, 2.0)], lower=5.0, upper=5.5)

    assert rounded(program, [1.0]) is None


def test_a_value_that_cannot_go_up_goes_down() -> None:
    program = Program()
    one, other = program.column(2.0), program.column(1.0, upper=1)
    program.row([(one, 2.0), (other, 1.0)], lower=5.0)
    program.row([(one, 1.0)], upper=2.4)

    assert rounded(program, [1.0, 1.0]) == [2.0, 1.0]


def test_columns_that_need_not_be_whole_keep_their_parts() -> None:
    program = Program()
    whole, part = program.column(1.0), program.column(3.0, whole=False)
    program.row([(whole, 1.0)], upper=1.5, lower=-INFINITY)
    program.row([(whole, 1.0), (part, 1.0)], lower=1.5)

    assert rounded(program, [1.0, 0.0]) == [1.0, 0.5]
