from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.layer_split import Times, slowest_s, split_layers


def of_stages(layers: int, stages: int, time: Callable[[int, int, int], float]) -> list[Times]:
    """As `split_layers` wants them: of a stage, by its first layer and one beyond its last."""
    return [
        np.array(
            [
                [time(stage, first, end) if end > first else math.inf for end in range(layers + 1)]
                for first in range(layers + 1)
            ]
        )
        for stage in range(stages)
    ]


def every_split(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(two - one for one, two in itertools.pairwise((0, *cuts, layers)))


def times(split: tuple[int, ...], cost: list[list[float]], limits: list[int]) -> list[float]:
    """Of each stage; a layer's time depends on the layer and on the stage."""
    found, first = [], 0
    for stage, count in enumerate(split):
        fits = count <= limits[stage]
        found.append(sum(cost[stage][first : first + count]) if fits else math.inf)
        first += count
    return found


@settings(deadline=None)
@given(
    data=st.data(),
    layers=st.integers(1, 8),
    stages=st.integers(1, 4),
)
def test_no_other_split_has_a_faster_slowest_stage_nor_less_time_in_all(
    data: st.DataObject, layers: int, stages: int
) -> None:
    one_time = st.integers(1, 20).map(float)
    cost = [[data.draw(one_time) for _ in range(layers)] for _ in range(stages)]
    limits = [data.draw(st.integers(1, 8)) for _ in range(stages)]

    arrays = of_stages(
        layers,
        stages,
        lambda stage, first, end: (
            sum(cost[stage][first:end]) if end - first <= limits[stage] else math.inf
        ),
    )
    found = split_layers(arrays)

    possible = [
        each
        for each in every_split(layers, stages)
        if not math.isinf(max(times(each, cost, limits)))
    ]
    if not possible:
        assert found is None
        return
    assert found in possible
    assert found is not None
    best = min(
        (max(times(each, cost, limits)), sum(times(each, cost, limits))) for each in possible
    )
    assert (max(times(found, cost, limits)), sum(times(found, cost, limits))) == best
    assert slowest_s(arrays, found) == best[0]


def test_a_stage_twice_as_fast_gets_twice_the_layers() -> None:
    arrays = of_stages(9, 2, lambda stage, first, end: (end - first) * (1.0 + stage))

    assert split_layers(arrays) == (6, 3)


def test_more_stages_than_layers_cannot_be() -> None:
    assert split_layers(of_stages(2, 3, lambda stage, first, end: 1.0)) is None
