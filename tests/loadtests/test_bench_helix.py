from __future__ import annotations

import pytest

from loadtests import bench_helix


def test_a_chain_carries_what_its_slowest_node_does() -> None:
    chain = [("A100-40", first, first + 8) for first in range(0, 80, 8)]

    assert bench_helix.flow(chain) == pytest.approx(bench_helix.PROFILES["A100-40"][7])


def test_a_token_may_enter_a_node_at_any_layer_that_it_holds() -> None:
    chain = [("A100-40", first, first + 10) for first in range(0, 80, 10)]
    chain[1] = ("A100-40", 9, 20)  # holds layer 9 too

    assert bench_helix.flow(chain) == pytest.approx(bench_helix.PROFILES["A100-40"][10])


def test_the_published_placement_carries_what_its_solver_reported() -> None:
    published = bench_helix.published()

    assert bench_helix.flow(published) == pytest.approx(952.107, abs=0.01)


def test_ours_uses_no_node_twice_and_carries_at_least_as_much() -> None:
    ours = bench_helix.planned()

    for kind, count in bench_helix.NODES.items():
        assert sum(each == kind for each, _, _ in ours) <= count
    assert bench_helix.flow(ours) >= bench_helix.flow(bench_helix.published())
