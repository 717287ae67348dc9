"""Which sets of nodes are looked at, where a model needs several."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.node_sets import MOST_NODES, MOST_SETS, Kind, NodeSet, sizes_of, worth_a_look

ROOMY = 1.5


def room_by_gpu(each: NodeSet, worth: Sequence[float]) -> float:
    return sum(sum(mine) * share for mine, share in zip(each, worth, strict=True))


def of_kind(kind: Kind) -> Iterator[tuple[int, ...]]:
    """All ways to take nodes of it, at most one in part."""
    yield ()
    for whole in range(kind.nodes):
        for size in kind.sizes:
            yield (*(kind.sizes[-1],) * whole, size)


def every_set(kinds: Sequence[Kind]) -> list[NodeSet]:
    found = []
    for each in itertools.product(*map(of_kind, kinds)):
        nodes = sum(map(len, each))
        in_part = sum(
            gpus < kind.sizes[-1] for kind, mine in zip(kinds, each, strict=True) for gpus in mine
        )
        if nodes == 2 or (2 < nodes <= MOST_NODES and in_part <= 1):
            found.append(each)
    return found


def contains(large: NodeSet, small: NodeSet) -> bool:
    return large != small and all(
        len(few) <= len(many) and all(one <= two for one, two in zip(few, many, strict=False))
        for few, many in zip(small, large, strict=True)
    )


@settings(deadline=None)
@given(
    kinds=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 3, 4])), min_size=1, max_size=3
    ),
    worth=st.lists(st.sampled_from([0.07, 0.13, 0.21, 0.4]), min_size=3, max_size=3),
    ranks=st.sampled_from([1, 2]),
)
def test_every_set_that_holds_the_model_and_contains_no_roomy_one_is_looked_at(
    kinds: list[tuple[int, int]], worth: list[float], ranks: int
) -> None:
    given_kinds = [Kind(nodes, sizes_of(gpus, ranks)) for nodes, gpus in kinds]

    def room(each: NodeSet) -> float:
        return room_by_gpu(each, worth[: len(kinds)])

    sets = worth_a_look(given_kinds, room)

    every = every_set(given_kinds)
    roomy = [each for each in every if room(each) >= ROOMY]
    wanted = {
        each
        for each in every
        if room(each) >= 1 and not any(contains(each, other) for other in roomy)
    }
    if wanted:
        assert len(sets.sets) == min(len(wanted), MOST_SETS)
        assert set(sets.sets) <= wanted
        assert len(sets.sets) + sets.left_out == len(wanted)
    elif sets.sets:
        (largest,) = sets.sets
        assert room(largest) == max(room(each) for each in every) < 1


def test_where_no_two_nodes_are_there_nothing_is_looked_at() -> None:
    assert worth_a_look([Kind(1, (1, 2, 4))], lambda _: 2.0).sets == ()


def test_sets_of_few_kinds_come_first_and_what_is_left_out_is_counted() -> None:
    kinds = [Kind(4, (8,)) for _ in range(8)]

    sets = worth_a_look(kinds, lambda each: room_by_gpu(each, [1 / 24] * 8))

    assert len(sets.sets) == MOST_SETS
    assert sets.left_out > MOST_SETS
    used = [sum(map(bool, each)) for each in sets.sets]
    assert used[:8] == [1] * 8


def test_where_there_are_too_many_kinds_to_count_all_sets_one_that_holds_is_found_yet() -> None:
    kinds = [Kind(1, (1,)) for _ in range(24)]

    sets = worth_a_look(kinds, lambda each: room_by_gpu(each, [1 / 14] * 24) + 1e-9)

    assert not sets.all_tried
    (only,) = sets.sets
    assert sum(map(len, only)) == 14


@pytest.mark.parametrize(
    ("gpus", "ranks", "sizes"), [(8, 1, (1, 2, 4, 8)), (6, 2, (2, 4, 6)), (3, 4, ()), (3, 2, (2,))]
)
def test_of_a_node_powers_of_two_are_taken_or_all(
    gpus: int, ranks: int, sizes: tuple[int, ...]
) -> None:
    assert sizes_of(gpus, ranks) == sizes
