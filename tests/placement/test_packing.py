from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.assignment import Wanted, assign
from placement.packing import Places, divisible, patterns
from placement.plan import NodeGpus


def wanted(*sizes: tuple[int, int], model: str = "") -> list[Wanted]:
    """Options with so many GPUs and replicas."""
    return [
        Wanted(key=key, model=model or f"m{key}", gpus=gpus, replicas=replicas)
        for key, (gpus, replicas) in enumerate(sizes)
    ]


def nodes(count: int, gpus: int = 8) -> dict[str, int]:
    return {f"n{index}": gpus for index in range(count)}


def on(placed: dict[int, tuple[NodeGpus, ...]], key: int = 0) -> list[tuple[str, tuple[int, ...]]]:
    return [(node.node, node.gpus) for node in placed[key]]


def test_patterns_are_the_ways_to_fill_a_node_to_which_nothing_can_be_added() -> None:
    assert patterns({3, 2}, 8) == [{3: 2, 2: 1}, {3: 1, 2: 2}, {2: 4}]
    assert patterns({16}, 8) == []


@pytest.mark.parametrize(
    ("sizes", "does"), [({1, 2, 4, 8}, True), ({2, 6}, True), ({2, 3}, False), (set(), True)]
)
def test_sizes_divide_each_other_or_not(sizes: set[int], does: bool) -> None:
    assert divisible(sizes) == does


def test_places_are_taken_on_the_fullest_nodes() -> None:
    places = Places(2, 8)

    places.take(4, 1)
    places.take(2, 1)

    assert places.room(8) == 1
    assert places.room(2) == 5
    assert places.gpus == 10
    with pytest.raises(ValueError, match="3 replicas of 8 GPUs do not fit"):
        places.take(8, 3)


def test_two_replicas_of_a_model_are_on_two_nodes_and_those_of_others_beside_them() -> None:
    placed = assign(nodes(4), wanted((1, 2), (1, 2)))

    assert on(placed, 0) == [("n0", (0,)), ("n1", (0,))]
    assert on(placed, 1) == [("n0", (1,)), ("n1", (1,))]


def test_many_replicas_do_not_lie_scattered_one_to_a_node() -> None:
    placed = assign(nodes(20), wanted((1, 16)))

    assert Counter(node for node, _ in on(placed)) == {"n0": 4, "n1": 4, "n2": 4, "n3": 4}


def test_replicas_share_a_node_where_there_is_no_other() -> None:
    assert on(assign(nodes(1), wanted((4, 2)))) == [("n0", (0, 1, 2, 3)), ("n0", (4, 5, 6, 7))]


def test_what_runs_stays_where_it_is() -> None:
    here = NodeGpus(node="n3", gpus=(6, 7))
    option = Wanted(key=0, model="m", gpus=2, replicas=2, running=(here,))

    assert here in assign(nodes(4), [option])[0]


def test_what_runs_moves_where_it_stands_in_the_way() -> None:
    scattered = tuple(NodeGpus(node=f"n{index}", gpus=(0,)) for index in range(2))
    small = Wanted(key=0, model="small", gpus=1, replicas=2, running=scattered)
    large = Wanted(key=1, model="large", gpus=8, replicas=1)

    placed = assign(nodes(2), [small, large])

    assert len({node for node, _ in on(placed, 0)}) == 1
    assert len(on(placed, 1)) == 1


def test_sizes_that_do_not_divide_each_other_fill_nodes_by_patterns() -> None:
    placed = assign(nodes(3, 6), wanted((3, 2), (2, 6)))

    assert sum(map(len, placed.values())) == 8


def test_more_than_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="GPUs"):
        assign(nodes(1), wanted((4, 3)))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whatever_ran_before_all_that_fits_is_placed_and_no_gpu_twice(seed: int) -> None:
    random = Random(seed)
    there = nodes(random.randint(1, 5), random.choice([3, 4, 8]))
    options, free = [], Places(len(there), there["n0"])
    for key, size in enumerate((8, 4, 2, 1)):
        replicas = random.randint(0, free.room(size)) if size <= there["n0"] else 0
        free.take(size, replicas)
        starts = {node: random.randrange(gpus) for node, gpus in there.items()}
        running = tuple(
            NodeGpus(node=node, gpus=tuple(range(start, start + size)))
            for node, start in starts.items()
            if start + size <= there[node]
        )
        options.append(
            Wanted(key=key, model=f"m{key % 2}", gpus=size, replicas=replicas, running=running)
        )

    placed = assign(there, options)

    used = Counter((p.node, gpu) for key in placed for p in placed[key] for gpu in p.gpus)
    assert set(used.values()) <= {1}
    assert all(gpu < there[node] for node, gpu in used)
    assert {option.key: option.replicas for option in options} == {
        key: len(replicas) for key, replicas in placed.items()
    }
