"""Which layers each stage of a pipeline gets, when stages are unlike: exact, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Callable

Cost = Callable[[int, int, int], float]  # of a stage, its first layer, and one beyond its last


def split_layers(num_layers: int, num_stages: int, cost: Cost) -> tuple[int, ...] | None:
    """Layers of each stage, so that the slowest is as fast as can be.

    `cost(stage, first, end)` is a stage's time with layers `first` to `end` - 1, infinite where they
    do not fit. Each stage gets at least one layer. Among equals that with the least total. None:
    the layers do not fit on the stages.
    """
    slowest = _best(num_layers, num_stages, cost, max)
    if slowest is None:
        return None
    limit = max(_costs(slowest, cost))

    def within(stage: int, first: int, end: int) -> float:
        time = cost(stage, first, end)
        return time if time <= limit else math.inf

    return _best(num_layers, num_stages, within, lambda one, other: one + other)


def _best(
    num_layers: int, num_stages: int, cost: Cost, join: Callable[[float, float], float]
) -> tuple[int, ...] | None:
    """The split whose stages' costs, joined, are least."""
    reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by layers given away
    for stage in range(num_stages):
        left = num_stages - stage - 1  # stages that still need a layer each
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (so_far, counts) in reached.items():
            ends = (num_layers,) if left == 0 else range(first + 1, num_layers - left + 1)
            for end in ends:
                if end <= first:
                    continue
                time = cost(stage, first, end)
                if math.isinf(time):
                    break  # more layers do not fit either
                total = join(so_far, time)
                if end not in following or total < following[end][0]:
                    following[end] = total, (*counts, end - first)
        reached = following
    found = reached.get(num_layers)
    return None if found is None else found[1]


def _costs(counts: tuple[int, ...], cost: Cost) -> list[float]:
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [
        cost(stage, first, first + count)
        for stage, (first, count) in enumerate(zip(starts, counts, strict=True))
    ]
