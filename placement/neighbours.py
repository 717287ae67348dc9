"""A good answer made better: the replicas of a few models are chosen anew while the others stay.

Where there are hardly any GPUs to spare, the solver's tree says little for hours, but a program of a
few models is solved in a moment, and what it frees serves the next few (large neighbourhood search;
Shaw 1998). Which models go together is drawn, always in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from placement.milp import Answer, Limits, Program

_FEWEST, _MOST = 3, 6  # models: their program is small, and yet they can change places
_EFFORT = 6  # of all rounds, for a node of the solver's tree
_PATIENCE = 5  # rounds without a better answer, then one model more
_ROUND_GAP, _ROUND_NODES = 5e-4, 50  # of a round's own program


def improved(
    program: Program, answer: Answer, columns_of: Sequence[Sequence[int]], limits: Limits
) -> Answer:
    """`answer`, or a cheaper one; `columns_of` are the columns of each model.

    Rounds end when the answer is as near to its bound as `limits` want, or their time or number is
    up. The bound stays what it was.
    """
    gap, random = limits.gap_for(program.width), Random(0)  # noqa: S311 - always the same plan
    effort = _EFFORT * limits.nodes_for(program.width)  # a round's grows as its program does
    most = min(_MOST, max(1, len(columns_of) // 2))  # else it is the whole program again
    together, failed = min(_FEWEST, most), 0
    while effort > 0 and answer.cost - answer.bound > gap * abs(answer.cost):
        left_s = limits.time_s - answer.seconds
        if left_s <= 0:
            break
        chosen = random.sample(range(len(columns_of)), together)
        found = _chosen_anew(program, answer, columns_of, chosen, left_s)
        effort -= together**2
        if found.cost < answer.cost:
            failed = 0
        else:
            failed += 1
        if failed == _PATIENCE:
            together, failed = min(most, together + 1), 0
        answer = found
    return answer


def _chosen_anew(
    program: Program,
    answer: Answer,
    columns_of: Sequence[Sequence[int]],
    chosen: Sequence[int],
    time_s: float,
) -> Answer:
    """The answer with the replicas of these models at their best, the others' held."""
    free = {column for model in chosen for column in columns_of[model]}
    held = {
        column: answer.values[column]
        for columns in columns_of
        for column in columns
        if column not in free
    }
    limits = Limits(time_s=time_s, gap=_ROUND_GAP, nodes=_ROUND_NODES)
    found = program.with_fixed(held).solve(limits, answer.values)
    if found is None:
        return answer
    seconds = answer.seconds + found.seconds
    if found.cost >= answer.cost:
        return replace(answer, seconds=seconds)
    return replace(answer, values=found.values, cost=found.cost, seconds=seconds)
