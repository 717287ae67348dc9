from __future__ import annotations

import pytest

from placement.first_fit import FreeGpus, ReplicaGpus
from tests.placement.builders import a_pool, an_inventory


def gpus(placement: tuple[ReplicaGpus, ...]) -> list[tuple[str, tuple[int, ...]]]:
    return [(node.node, node.gpus) for replica in placement for node in replica]


def test_the_first_nodes_with_room_are_filled_from_their_lowest_gpus() -> None:
    pool = a_pool(nodes=3, gpus_per_node=4)
    free = FreeGpus(an_inventory(pool))

    first = free.take(pool, 3, 2)
    second = free.take(pool, 1, 3)

    assert gpus(first) == [("h100-0", (0, 1, 2)), ("h100-1", (0, 1, 2))]
    assert gpus(second) == [("h100-0", (3,)), ("h100-1", (3,)), ("h100-2", (0,))]


def test_a_replica_never_spans_nodes() -> None:
    pool = a_pool(nodes=2, gpus_per_node=3)
    free = FreeGpus(an_inventory(pool))

    assert free.replicas_that_fit(pool, 2) == 2
    assert free.replicas_that_fit(pool, 4) == 0


def test_what_does_not_fit_takes_nothing() -> None:
    pool = a_pool(gpus_per_node=2)
    free = FreeGpus(an_inventory(pool))

    with pytest.raises(ValueError, match="3 replicas of 1 GPUs exceed h100"):
        free.take(pool, 1, 3)

    assert free.in_pool(pool) == 2
