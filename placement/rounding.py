"""A good answer to a large program at once: its relaxation, rounded one column after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from placement.milp import Program, Relaxation

_WHOLE = 1e-6  # nearer than this to a whole number is one
_ROUNDS = 20  # for each column: whoever needs more is not getting anywhere


def rounded(program: Program, weights: Sequence[float]) -> list[float] | None:
    """A feasible point of `program` near the best one; None where rounding finds none.

    Of the columns that are not whole yet, the weightiest first, since the light ones fit into the
    gaps that are left; up where a row has no more than it needs, so that it keeps what it needs,
    else down. After each, the rest is solved anew: what was rounded up takes from others what
    matters least. Some hundred solutions of a linear program, each from the one before, cost less
    than the solver's own first node.
    """
    relaxation = Relaxation(program)
    for _ in range(_ROUNDS * len(weights)):
        if relaxation.values is None:
            return None
        open_ = [
            index
            for index in program.whole
            if abs(relaxation.values[index] - round(relaxation.values[index])) > _WHOLE
        ]
        if not open_:
            return _with_whole(program, relaxation.values)
        if not _round_one(relaxation, open_, weights):
            return None
    return None


def _round_one(relaxation: Relaxation, open_: Sequence[int], weights: Sequence[float]) -> bool:
    assert relaxation.values is not None  # noqa: S101 - the caller looked
    values = relaxation.values
    short = {index: relaxation.is_scarce(index) for index in open_}

    def rank(index: int) -> tuple[float, bool, float]:
        over = values[index] - math.floor(values[index])
        return -weights[index], not short[index], 1 - over if short[index] else over

    chosen = min(open_, key=rank)
    below = math.floor(values[chosen])
    up = (below + 1.0, math.inf)
    down = (-math.inf, float(below))
    ways = (up, down) if short[chosen] else (down, up)
    return any(relaxation.narrow(chosen, lower, upper) for lower, upper in ways)


def _with_whole(program: Program, values: Sequence[float]) -> list[float]:
    point = list(values)
    for index in program.whole:
        point[index] = float(round(point[index]))
    return point
