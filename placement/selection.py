"""How many replicas of which option each model gets: an integer program over counted nodes.

Equal nodes are counted, not named, so that no symmetry is left to search; `placement.assignment`
then names GPUs. First everything that is needed is demanded. If that is impossible, as few models
as possible go short, by as little as possible, and what is left of the needs is demanded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from placement.formulation import TIE, Formulation
from placement.greedy import first_answer, free_beside
from placement.milp import Answer, Limits
from placement.neighbours import improved
from placement.problem import Need, Problem, TwoSides, score

_FIRST_NODES = 10  # of its tree: more say little, while rounds of a few models improve at once
_GOAL = 0.01  # of the rounds: half a percent would take as long again
_SOLVER_SHARE = 2 / 3  # of the time for a large program; the rest improves what it found


@dataclass(frozen=True, slots=True)
class Selection:
    """The replicas of each of the problem's columns; how good they are, and can be at best."""

    counts: tuple[int, ...]
    objective: float
    bound: float
    seconds: float = 0.0
    needs: tuple[Need, ...] = ()  # as far as they are met


def select(problem: Problem, limits: Limits) -> Selection:
    """The best counts for the problem's objective; deterministic unless the time limit cuts in.

    The greedy answer comes first, so that there always is one; the solver improves on it.
    """
    return select_all_met(problem, limits) or _short(problem, limits, first_answer(problem))


def select_all_met(problem: Problem, limits: Limits) -> Selection | None:
    """As `select`; None where not all needs can be met."""
    first = first_answer(problem)
    if not problem.meets(first):
        return _solve(problem, limits, None)
    return _solve(problem, limits, first) or _as_selection(problem, first)


def _short(problem: Problem, limits: Limits, first: Sequence[int]) -> Selection:
    """Not all needs can be met: the least shortfall, then the best objective with just that."""
    counts = list(first)
    form = Formulation(problem, soft=True)
    answer = form.program.solve(limits, form.start(None))
    seconds = 0.0
    if answer is not None:
        counts, seconds = form.counts(answer), answer.seconds
    needs = tuple(_what_is_met(problem, counts, model) for model in range(len(problem.needs)))
    eased = replace(problem, needs=needs)
    better = _solve(eased, limits, counts)
    if better is None:
        return replace(_as_selection(eased, counts), seconds=seconds)
    return replace(better, seconds=seconds + better.seconds)


def _what_is_met(problem: Problem, counts: Sequence[int], model: int) -> Need:
    need = problem.needs[model]
    rate = problem.rate(counts, model)
    firm = problem.rate(counts, model, firm_only=True)
    return replace(
        need,
        rate=min(need.rate, rate),
        firm_rate=min(need.firm_rate, firm),
        least=min(need.least, problem.replicas(counts, model)),
        rate_after_loss=min(need.rate_after_loss, problem.after_loss(counts, model)),
        replicas_after_loss=min(
            need.replicas_after_loss, int(problem.after_loss(counts, model, replicas=True) + 1e-6)
        ),
    )


def _solve(problem: Problem, limits: Limits, start: Sequence[int] | None) -> Selection | None:
    form = Formulation(problem, start=start)
    answer = _answer(form, problem, limits, form.start(start))
    if answer is None:
        return None
    counts = form.counts(answer)
    seconds, bound = answer.seconds, answer.bound
    # Compared with the answer's own cost, which like the bound counts what breaks ties.
    proven = form.exact and answer.cost - bound <= TIE * max(abs(answer.cost), 1e-9)
    if problem.objective == "headroom" and form.load_factor is not None:
        factor = answer.values[form.load_factor]
        bound = -answer.bound
        begin = _what_runs(problem, factor) or counts
        form = Formulation(problem, load_factor=factor * (1 - 1e-9), start=begin)
        cheapest = form.program.solve(limits, form.start(begin))
        if cheapest is not None:
            counts, seconds = form.counts(cheapest), seconds + cheapest.seconds
        bound = 1 / bound if bound > 0 else 0.0
    reached = score(problem, counts)
    if not form.exact:
        bound = min(bound, best_without_limits(problem))
    return Selection(
        counts=tuple(counts),
        objective=reached,
        bound=reached if proven else min(reached, bound),
        seconds=seconds,
        needs=problem.needs,
    )


def _answer(
    form: Formulation, problem: Problem, limits: Limits, start: Sequence[float] | None
) -> Answer | None:
    """The solver's, improved where it is large and far from the best."""
    if not form.program.large or problem.objective == "headroom":  # which all models move together
        return form.program.solve(limits, start)
    first = replace(
        limits, time_s=_SOLVER_SHARE * limits.time_s, nodes=limits.nodes or _FIRST_NODES
    )
    answer = form.program.solve(first, start)
    if answer is None:
        return None
    columns = [form.columns_of(model) for model in range(len(problem.needs))]
    goal = _GOAL if limits.gap is None else limits.gap
    return improved(form.program, answer, columns, replace(limits, gap=goal))


def _what_runs(problem: Problem, factor: float) -> list[int] | None:
    """The counts of what runs, if demands may grow as much with it; None: something must move."""
    counts = [column.running for column in problem.columns]
    if not any(counts) or not problem.meets(counts):
        return None
    allowed = all(
        problem.replicas(counts, model) <= need.most for model, need in enumerate(problem.needs)
    )
    enough = problem.load_factor(counts) >= factor * (1 - 1e-9)
    fits = free_beside(problem, counts) is not None
    return counts if allowed and enough and fits else None


def best_without_limits(problem: Problem) -> float:
    """A bound that needs no search: every model alone on endless GPUs of its best kind."""
    if problem.objective == "headroom":
        return 0.0
    total = 0.0
    for model, need in enumerate(problem.needs):
        mine = [problem.columns[index] for index in problem.answering(model)]
        if problem.objective == "throughput":
            total -= need.most * max((column.rate for column in mine), default=0.0)
            continue
        ways = [(c.price, c.price / c.rate) for c in mine if c.rate > 0 and c.pair is None]
        ways += [way for pair in problem.pairs(model) for way in _of_both(problem, pair)]
        by_rate = min((each for _, each in ways), default=0.0)
        total += max(
            need.rate * by_rate, need.least * min((price for price, _ in ways), default=0.0)
        )
    return total


def _of_both(problem: Problem, pair: TwoSides) -> Iterator[tuple[float, float]]:
    """At least: the price of a replica that answers, and that of a request/s on both sides."""
    prefill, decode = (problem.columns[index] for index in pair)
    if prefill.rate > 0 and decode.rate > 0:
        yield decode.price, prefill.price / prefill.rate + decode.price / decode.rate


def _as_selection(problem: Problem, counts: Sequence[int]) -> Selection:
    reached = score(problem, counts)
    return Selection(
        counts=tuple(counts),
        objective=reached,
        bound=min(reached, best_without_limits(problem)),
        needs=problem.needs,
    )
