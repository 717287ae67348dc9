"""Why a model has prefill and decode replicas, or has none: with what the other way would cost."""

from __future__ import annotations

from dataclasses import replace

from placement.disaggregation import why_not
from placement.in_words import in_words
from placement.milp import Limits
from placement.option import Option
from placement.plan import Plan
from placement.problem import Problem
from placement.question import Question, running_here
from placement.selection import Selection, select_all_met


def roles_in_words(
    question: Question, now: Selection | None, plan: Plan, model: int, *, limits: Limits
) -> str | None:
    """One sentence or two; None: the fleet does not ask (`disaggregate: never`).

    `now`: what was chosen; None: not all needs can be met, so that there is nothing to compare.
    """
    options = question.options[model]
    if options.wish.disaggregate == "never":
        return None
    if not options.pairs:
        reason = why_not(options.rejected)
        return f"not possible: {reason or 'replicas.max is 1, or no shape of it is legal'}"
    if now is None:
        return None
    used = _used(question, plan, model)
    other = select_all_met(_only(question.problem, model, in_roles=not used), limits)
    told = None if other is None else _of(question, other, model, now, plan.currency)
    if used:
        instead = told or "not all needs could be met"
        return f"{_sides(used)}; whole replicas instead: {instead}"
    return f"not chosen: {told or 'not all needs could be met with it'}"


def _used(question: Question, plan: Plan, model: int) -> list[Option]:
    """The prefill and the decode side, if the plan has them."""
    wish = question.options[model].wish
    for pair in question.problem.pairs(model):
        sides = [question.choices[index] for index in pair]
        if all(running_here(side, wish, plan.variants, question.groups) for side in sides):
            return sides
    return []


def _only(problem: Problem, model: int, *, in_roles: bool) -> Problem:
    """The problem in which the model has prefill and decode replicas only, or whole ones only."""
    columns = tuple(
        replace(column, rate=0.0)
        if column.model == model and (column.pair is not None) != in_roles
        else column
        for column in problem.columns
    )
    return replace(problem, columns=columns)


def _sides(used: list[Option]) -> str:
    prefill, decode = used
    handover = prefill.handover
    return (
        f"a prefill replica reads {prefill.capacity.requests_per_s:.3g} prompts/s, a decode "
        f"replica writes {decode.capacity.requests_per_s:.3g} answers/s; a long prompt's KV cache "
        f"is sent in {handover.transfer_s:.2f} s, its first token comes {handover.first_token_s:.2f} s "
        "later"
    )


def _of(question: Question, other: Selection, model: int, now: Selection, currency: str) -> str:
    """Another answer and what it costs, beside `now`."""
    words = in_words(question, other, model)
    problem = question.problem
    if problem.objective == "cost":
        more = sum(
            (there - here) * column.price
            for there, here, column in zip(other.counts, now.counts, problem.columns, strict=True)
        )
        return f"{words}, {more:+.2f} {currency}/h"
    if problem.objective == "throughput":
        return f"{words}, {-other.objective:.3g} instead of {-now.objective:.3g} requests/s in all"
    return f"{words}, {100 * other.objective:.0f} % used instead of {100 * now.objective:.0f} %"
