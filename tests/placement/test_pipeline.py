from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.pipeline import layer_partition, pipeline_stages


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (32, 1, (32,)),
        (32, 4, (8, 8, 8, 8)),
        (61, 2, (31, 30)),
        (61, 4, (15, 15, 16, 15)),
        (62, 4, (15, 16, 16, 15)),
        (63, 4, (16, 16, 16, 15)),
        (36, 5, (7, 7, 7, 8, 7)),
    ],
)
def test_remaining_layers_go_to_the_middle(
    layers: int, stages: int, expected: tuple[int, ...]
) -> None:
    assert layer_partition(layers, stages) == expected


@given(layers=st.integers(1, 200), stages=st.integers(1, 32))
def test_every_layer_is_on_one_stage(layers: int, stages: int) -> None:
    if stages > layers:
        return
    parts = pipeline_stages(layers, stages)

    held = [
        layer
        for part in parts
        for layer in range(part.first_layer, part.first_layer + part.num_layers)
    ]
    assert held == list(range(layers))
    assert [part.is_first for part in parts].count(True) == 1
    assert parts[0].is_first
    assert parts[-1].is_last


def test_a_partition_that_is_given_is_kept() -> None:
    parts = pipeline_stages(10, 3, (2, 5, 3))

    assert [(part.first_layer, part.num_layers) for part in parts] == [(0, 2), (2, 5), (7, 3)]
