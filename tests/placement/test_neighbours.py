from __future__ import annotations

from dataclasses import replace

import pytest

from placement.formulation import Formulation
from placement.milp import Answer, Limits, Program
from placement.neighbours import improved
from placement.selection import select
from tests.placement.test_rounding import a_large_problem, fits


def rounded_down(form: Formulation) -> Answer:
    """A feasible answer that is not good, with the relaxation's bound."""
    start = form.start(None)
    assert start is not None
    found = form.program.solve(Limits(nodes=1, time_s=60), start)
    assert found is not None
    return replace(found, values=tuple(start), cost=form.program.cost(start))


@pytest.mark.parametrize("objective", ["cost", "throughput"])
@pytest.mark.parametrize("seed", range(2))
def test_an_answer_gets_no_dearer_keeps_every_need_and_the_bound(seed: int, objective: str) -> None:
    problem = a_large_problem(seed, objective=objective)
    form = Formulation(problem)
    before = rounded_down(form)
    columns = [form.columns_of(model) for model in range(len(problem.needs))]

    after = improved(form.program, before, columns, Limits(gap=0.0, nodes=10, time_s=60))
    counts = form.counts(after)

    assert after.cost <= before.cost
    assert after.bound == before.bound
    assert after.bound <= after.cost
    assert form.program.cost(after.values) == pytest.approx(after.cost)
    assert problem.meets(counts)
    assert fits(problem, counts)


def test_it_is_the_same_every_time_and_better_than_the_start() -> None:
    problem = a_large_problem(1, objective="cost")
    form = Formulation(problem)
    before = rounded_down(form)
    columns = [form.columns_of(model) for model in range(len(problem.needs))]

    one, two = (
        improved(form.program, before, columns, Limits(gap=0.0, nodes=30, time_s=60))
        for _ in range(2)
    )

    assert one.values == two.values
    assert one.cost < before.cost


def test_an_answer_that_is_near_enough_or_has_no_time_left_stays() -> None:
    program = Program()
    column = program.column(1.0, upper=9)
    program.row([(column, 1.0)], lower=2.0)
    near = Answer(values=(9.0,), cost=9.0, bound=8.99, seconds=0.0)
    late = Answer(values=(9.0,), cost=9.0, bound=2.0, seconds=31.0)

    assert improved(program, near, [[column]], Limits(gap=0.01)) == near
    assert improved(program, late, [[column]], Limits(gap=0.01, time_s=30.0)) == late
    better = improved(program, replace(late, seconds=0.0), [[column]], Limits(gap=0.01))
    assert better.values == (2.0,)


def test_a_program_with_columns_held_keeps_them_and_the_others_are_free() -> None:
    program = Program()
    one, other = program.column(1.0, upper=9), program.column(2.0, upper=9)
    program.row([(one, 1.0), (other, 1.0)], lower=5.0)

    held = program.with_fixed({one: 2.0}).solve(Limits())
    free = program.solve(Limits())

    assert held is not None
    assert free is not None
    assert held.values == (2.0, 3.0)
    assert free.values == (5.0, 0.0)


def test_where_not_all_demands_can_be_met_the_gap_is_small_too() -> None:
    problem = a_large_problem(0, objective="throughput")
    needs = tuple(replace(need, rate=2.0 * need.rate) for need in problem.needs)
    problem = replace(problem, needs=needs)

    found = select(problem, Limits(time_s=120))

    assert any(not problem.met(found.counts, model) for model in range(len(needs)))
    assert fits(problem, list(found.counts))
    assert found.objective - found.bound <= 0.02 * abs(found.objective)


def test_every_column_of_replicas_belongs_to_a_model() -> None:
    problem = a_large_problem(0)
    form = Formulation(problem)

    columns = [form.columns_of(model) for model in range(len(problem.needs))]

    assert sum(map(len, columns)) == len(problem.columns)
