"""Which layers each stage of a pipeline gets, when stages are unlike: exact, by dynamic programming."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]  # of a stage, by its first layer and one beyond its last


def split_layers(stages: Sequence[Times]) -> tuple[int, ...] | None:
    """Layers of each stage, so that the slowest is as fast as can be.

    `stages[s][first, end]` is a stage's time with layers `first` to `end` - 1, infinite where they do
    not fit and where there are none: each stage gets at least one layer. Among equals that with the
    least total. None: the layers do not fit on the stages.
    """
    slowest = _best(stages, np.maximum)
    if slowest is None:
        return None
    limit = slowest_s(stages, slowest)
    within = {id(times): np.where(times <= limit, times, np.inf) for times in stages}
    return _best([within[id(times)] for times in stages], np.add)


def slowest_s(stages: Sequence[Times], split: Sequence[int]) -> float:
    """The time of the slowest stage."""
    ends = list(itertools.accumulate(split, initial=0))
    return max(
        float(times[first, end])
        for times, (first, end) in zip(stages, itertools.pairwise(ends), strict=True)
    )


def _best(stages: Sequence[Times], join: np.ufunc) -> tuple[int, ...] | None:
    """The split whose stages' times, joined, are least."""
    layers = len(stages[0]) - 1
    reached = np.full(layers + 1, np.inf)  # by layers given away
    reached[0] = 0.0
    starts = []
    for times in stages:
        joined = join(reached[:, np.newaxis], times)
        starts.append(joined.argmin(axis=0))
        reached = joined.min(axis=0)
    if np.isinf(reached[layers]):
        return None
    counts, end = [], layers
    for start in reversed(starts):
        counts.append(end - int(start[end]))
        end = int(start[end])
    return tuple(reversed(counts))
