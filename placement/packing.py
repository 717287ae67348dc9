"""How many replicas of which sizes fit on equal nodes, none across two of them.

When each size divides the next larger one, as powers of two do, a count decides: a node of B GPUs
has B // s places for size s, a replica of size g takes g / s of them wherever it is, so everything
fits exactly when, for each size s, the larger ones and it need at most nodes x (B // s) places
(bin packing with divisible item sizes; Coffman, Garey and Johnson 1987). For other sizes, whole
numbers of nodes are filled by patterns: the maximal ways to fill one node.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

MOST_PATTERNS = 5_000


def divisible(sizes: Collection[int]) -> bool:
    """Whether each size divides the next larger one."""
    ordered = sorted(set(sizes))
    return all(larger % size == 0 for size, larger in itertools.pairwise(ordered))


def patterns(sizes: Collection[int], gpus_per_node: int) -> list[dict[int, int]]:
    """Every way to fill a node to which no replica can be added; at most `MOST_PATTERNS` of them."""
    found: list[dict[int, int]] = []
    ordered = sorted({size for size in sizes if size <= gpus_per_node}, reverse=True)

    def fill(index: int, left: int, taken: dict[int, int]) -> None:
        if len(found) >= MOST_PATTERNS:
            return
        if index == len(ordered):
            if left < ordered[-1]:
                found.append({size: count for size, count in taken.items() if count})
            return
        size = ordered[index]
        for count in range(left // size, -1, -1):
            fill(index + 1, left - count * size, {**taken, size: count})

    if ordered:
        fill(0, gpus_per_node, {})
    return found


class Places:
    """The free GPUs of equal nodes, counted by how many of a node are free."""

    def __init__(self, nodes: int, gpus_per_node: int) -> None:
        self._nodes = Counter({gpus_per_node: nodes})

    def copy(self) -> Places:
        """The same, to take places of on trial."""
        copied = Places(0, 0)
        copied._nodes = self._nodes.copy()
        return copied

    @property
    def gpus(self) -> int:
        """All that are free."""
        return sum(free * nodes for free, nodes in self._nodes.items())

    def room(self, size: int) -> int:
        """How many replicas of `size` GPUs fit, each inside one node."""
        return sum(free // size * nodes for free, nodes in self._nodes.items())

    def take(self, size: int, replicas: int) -> None:
        """Take places for `replicas`, on the fullest nodes that have them.

        Raises:
            ValueError: they do not fit; some may have been taken.
        """
        for _ in range(replicas):
            fitting = [free for free, nodes in self._nodes.items() if nodes and free >= size]
            if not fitting:
                raise ValueError(f"{replicas} replicas of {size} GPUs do not fit")
            fullest = min(fitting)
            self._nodes[fullest] -= 1
            self._nodes[fullest - size] += 1


def fill_nodes(
    counts: Mapping[int, int], used: Sequence[tuple[Mapping[int, int], int]]
) -> list[list[int]]:
    """Sizes on each node when patterns are used so often; places that nobody needs stay free.

    Raises:
        ValueError: the patterns have too few places for `counts`.
    """
    left = dict(counts)
    nodes = []
    for pattern, times in used:
        for _ in range(times):
            node = []
            for size, places in pattern.items():
                here = min(places, left.get(size, 0))
                left[size] = left.get(size, 0) - here
                node += [size] * here
            nodes.append(node)
    if any(left.values()):
        raise ValueError(f"no places for {left}")
    return nodes
