"""Which sets of nodes may hold a model together: those that just do, and some that are roomier.

All sets of few kinds of nodes come before those of many. A set that contains a roomy one is left
out: nodes beyond those carry more elsewhere. What remains is many sets where kinds are many, so the
first of each combination of kinds are looked at, and how many were left out is told.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

MOST_NODES = 16  # of a set
MOST_SETS = 16
_ROOMY = 1.5  # times what the model needs
_MOST_TRIED = 4_000  # sets whose room is counted

Taken = tuple[int, ...]  # GPUs of each node of a kind; at most the last node is taken in part
NodeSet = tuple[Taken, ...]  # by kind; () where the set has no node of a kind


@dataclass(frozen=True, slots=True)
class Kind:
    """Nodes that are alike."""

    nodes: int  # that there are
    sizes: tuple[int, ...]  # numbers of GPUs that may be taken of one, the largest last


@dataclass(frozen=True, slots=True)
class NodeSets:
    """The sets to look at; where none holds the model, the largest."""

    sets: tuple[NodeSet, ...]
    left_out: int = 0  # that hold the model too
    all_tried: bool = True  # otherwise sets of many kinds were not even counted


def sizes_of(gpus_per_node: int, ranks: int) -> tuple[int, ...]:
    """Numbers of GPUs to take of a node, in groups of `ranks`: powers of two, and all."""
    powers = (1 << power for power in range(gpus_per_node.bit_length()))
    return tuple(size for size in sorted({*powers, gpus_per_node}) if size % ranks == 0)


def worth_a_look(kinds: Sequence[Kind], room: Callable[[NodeSet], float]) -> NodeSets:
    """Sets of 2 to `MOST_NODES` nodes to look at.

    `room`: what a set has over what the model needs; from 1 on it may hold the model. A set of more
    than two nodes has at most one that is taken in part.
    """
    search = _Search(kinds, room)
    holding = sorted(search.holding(), key=_size)
    seen: Counter[tuple[int, ...]] = Counter()
    ranked = []
    for each in holding:
        used = _used(each)
        ranked.append((seen[used], len(used), *_size(each)))
        seen[used] += 1
    order = sorted(range(len(holding)), key=lambda index: ranked[index])
    chosen = tuple(holding[index] for index in order[:MOST_SETS])
    if not chosen:
        largest = search.largest()
        chosen = () if largest is None else (largest,)
    return NodeSets(chosen, max(0, len(holding) - MOST_SETS), search.tried < _MOST_TRIED)


@dataclass(slots=True)
class _Search:
    kinds: Sequence[Kind]
    room: Callable[[NodeSet], float]
    tried: int = 0
    _rooms: dict[NodeSet, float] = field(default_factory=dict)

    def holding(self) -> list[NodeSet]:
        """Sets that may hold the model and contain no roomy one."""
        found = []
        there = [index for index, kind in enumerate(self.kinds) if kind.nodes and kind.sizes]
        for count in range(1, min(len(there), MOST_NODES) + 1):
            for used in itertools.combinations(there, count):
                found += [
                    each
                    for each in self._grown(used, ((),) * len(self.kinds))
                    if self._room(each) >= 1 and not any(map(self._is_roomy, self._within(each)))
                ]
                if self.tried >= _MOST_TRIED:
                    return found
        return found

    def largest(self) -> NodeSet | None:
        """Whole nodes, the roomiest first, until they may hold the model; None: one node at most."""
        single = [
            ((),) * index + ((kind.sizes[-1],),) + ((),) * (len(self.kinds) - index - 1)
            for index, kind in enumerate(self.kinds)
            if kind.nodes and kind.sizes
        ]
        nodes = [
            index
            for each in sorted(single, key=lambda each: -self.room(each))
            for index in _used(each)
            for _ in range(self.kinds[index].nodes)
        ]
        taken: NodeSet = ((),) * len(self.kinds)
        for index in nodes[:MOST_NODES]:
            taken = _with(taken, index, (*taken[index], self.kinds[index].sizes[-1]))
            if _num_nodes(taken) > 1 and self.room(taken) >= 1:
                break
        return taken if _num_nodes(taken) > 1 else None

    def _grown(self, used: Sequence[int], taken: NodeSet) -> Iterator[NodeSet]:
        """Sets with nodes of all the kinds `used`, beside what is `taken`."""
        if not used:
            if _num_nodes(taken) > 1:
                yield taken
            return
        first, others = used[0], used[1:]
        for mine in _choices(self.kinds[first], MOST_NODES - _num_nodes(taken) - len(others)):
            more = _with(taken, first, mine)
            if not self._is_allowed(more):
                continue
            roomy = self._is_roomy(more)
            if not (roomy and others) and self.tried < _MOST_TRIED:
                yield from self._grown(others, more)
            if roomy:
                return  # what follows contains it

    def _within(self, each: NodeSet) -> Iterator[NodeSet]:
        """The sets that are smaller by a node, or a node by one size."""
        for index in _used(each):
            *others, last = each[index]
            yield _with(each, index, tuple(others))
            smaller = [size for size in self.kinds[index].sizes if size < last]
            if smaller and self._is_allowed(less := _with(each, index, (*others, smaller[-1]))):
                yield less

    def _is_roomy(self, each: NodeSet) -> bool:
        return _num_nodes(each) > 1 and self._room(each) >= _ROOMY

    def _room(self, each: NodeSet) -> float:
        if each not in self._rooms:
            self.tried += 1
            self._rooms[each] = self.room(each)
        return self._rooms[each]

    def _is_allowed(self, each: NodeSet) -> bool:
        if _num_nodes(each) < 3:
            return True
        in_part = (
            gpus < kind.sizes[-1]
            for kind, mine in zip(self.kinds, each, strict=True)
            for gpus in mine
        )
        return sum(in_part) < 2


def _choices(kind: Kind, most: int) -> Iterator[Taken]:
    """From part of a node to all nodes, but at most so many; each contains those before."""
    for whole in range(min(kind.nodes, most)):
        for size in kind.sizes:
            yield (*(kind.sizes[-1],) * whole, size)


def _with(each: NodeSet, index: int, mine: Taken) -> NodeSet:
    return (*each[:index], mine, *each[index + 1 :])


def _used(each: NodeSet) -> tuple[int, ...]:
    return tuple(index for index, mine in enumerate(each) if mine)


def _num_nodes(each: NodeSet) -> int:
    return sum(map(len, each))


def _size(each: NodeSet) -> tuple[int, int, NodeSet]:
    return _num_nodes(each), sum(map(sum, each)), each
