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

_TOGETHER = 4  # models: their program is small, and yet they can change places
_SHARE = 2  # nodes of the solver's tree that a round stands for
_GAP, _NODES = 1e-4, 50  # of a round's own program


def improved(
    program: Program, answer: Answer, columns_of: Sequence[Sequence[int]], limits: Limits
) -> Answer:
    """`answer`, or a cheaper one; `columns_of` are the columns of each model.

    Rounds end when the answer is as near to its bound as `limits` want, or their time or number is
    up. The bound stays what it was.
    """
    gap = limits.gap_for(program.width)
    left_s = limits.time_s - answer.seconds
    random = Random(0)  # noqa: S311 - the same plan every time
    for _ in range(limits.nodes_for(program.width) // _SHARE):
        if answer.cost - answer.bound <= gap * abs(answer.cost) or left_s <= 0:
            break
        chosen = random.sample(range(len(columns_of)), min(_TOGETHER, len(columns_of)))
        free = {column for model in chosen for column in columns_of[model]}
        held = {
            column: answer.values[column]
            for columns in columns_of
            for column in columns
            if column not in free
        }
        round_limits = Limits(time_s=left_s, gap=_GAP, nodes=_NODES)
        found = program.with_fixed(held).solve(round_limits, answer.values)
        if found is None:
            continue
        left_s -= found.seconds
        answer = replace(answer, seconds=answer.seconds + found.seconds)
        if found.cost < answer.cost:
            answer = replace(answer, values=found.values, cost=found.cost)
    return answer
