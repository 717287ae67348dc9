"""Which layers each stage of a pipeline gets, when stages are unlike: exact, by dynamic programming."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]  # of a stage, by its first layer and one beyond its last


def split_layers(stages: Sequence[Times], *others: Sequence[Times]) -> tuple[int, ...] | None:
    """Layers of each stage, so that the slowest is as fast as can be.

    `stages[s][first, end]` is a stage's time with layers `first` to `end` - 1, infinite where they do
    not fit and where there are none: each stage gets at least one layer. Among equals that whose
    slowest stage is fastest by the first of `others`, and so on; then that with the least total.
    None: the layers do not fit on the stages.
    """
    allowed: dict[int, NDArray[np.bool_]] = {}  # of stages that share an array, once
    for times in (stages, *others):
        slowest = _best(_within(times, stages, allowed), np.maximum)
        if slowest is None:
            return None
        limit = slowest_s(times, slowest)
        for key, each in {id(key): each for key, each in zip(stages, times, strict=True)}.items():
            fits = each <= limit
            allowed[key] = allowed[key] & fits if key in allowed else fits
    return _best(_within(stages, stages, allowed), np.add)


def slowest_s(stages: Sequence[Times], split: Sequence[int]) -> float:
    """The time of the slowest stage."""
    ends = list(itertools.accumulate(split, initial=0))
    return max(
        float(times[first, end])
        for times, (first, end) in zip(stages, itertools.pairwise(ends), strict=True)
    )


def _within(
    times: Sequence[Times], stages: Sequence[Times], allowed: Mapping[int, NDArray[np.bool_]]
) -> list[Times]:
    """The times, infinite where a stage of `stages` is not allowed to have such layers."""
    if not allowed:
        return list(times)
    found: dict[int, Times] = {}
    for each, key in zip(times, map(id, stages), strict=True):
        if key not in found:
            found[key] = np.where(allowed[key], each, np.inf)
    return [found[id(stage)] for stage in stages]


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
