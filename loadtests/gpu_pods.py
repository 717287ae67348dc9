"""A trace of pods that ask for GPUs, or shares of one, packed one by one and all at once."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from placement.milp import Limits
from placement.problem import Column, Need, Nodes, Problem
from placement.selection import select

WHOLE = 1000  # thousandths of a GPU


@dataclass(frozen=True, slots=True)
class Pod:
    """GPUs, thousandths of each, and the types that will do; none: any."""

    gpus: int
    milli: int
    types: frozenset[str]

    @property
    def asked(self) -> float:
        """GPUs, with shares counted as such."""
        return self.gpus * self.milli / WHOLE


@dataclass(frozen=True, slots=True)
class Pods:
    """Pods in order of arrival, and the nodes that there are, by type and number of GPUs."""

    arrivals: tuple[Pod, ...]
    nodes: Mapping[tuple[str, int], int]

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return sum(size * count for (_, size), count in self.nodes.items())

    @property
    def asked(self) -> float:
        """GPUs that all pods together ask for."""
        return sum(pod.asked for pod in self.arrivals)


Rule = Callable[[Pod, Sequence[Sequence[int]], Sequence[int]], int]  # pod, free, fitting nodes


def _first(_pod: Pod, _free: Sequence[Sequence[int]], fitting: Sequence[int]) -> int:
    return fitting[0]


def _best(pod: Pod, free: Sequence[Sequence[int]], fitting: Sequence[int]) -> int:
    """The node with least left; of a GPU to share, the one with least left."""

    def left(index: int) -> tuple[int, int]:
        return min(milli for milli in free[index] if milli >= pod.milli), sum(free[index])

    return min(fitting, key=lambda index: (*left(index), index))


RULES: Mapping[str, Rule] = {"first fit": _first, "best fit": _best}


def read_pods(pods: Path, nodes: Path) -> Pods:
    """The pods that ask for GPUs, and the nodes that have some."""
    with _open(pods) as file:
        arrivals = tuple(
            Pod(
                gpus=int(row["num_gpu"]),
                milli=int(row["gpu_milli"]),
                types=frozenset(filter(None, (row["gpu_spec"] or "").split("|"))),
            )
            for row in csv.DictReader(file)
            if int(row["num_gpu"]) > 0
        )
    with _open(nodes) as file:
        rows = [(row["model"], int(row["gpu"])) for row in csv.DictReader(file)]
    return Pods(arrivals, dict(Counter(row for row in rows if row[1] > 0)))


def one_by_one(pods: Pods, rule: Rule) -> tuple[float, int]:
    """GPUs given out when each pod takes the node that `rule` picks; pods that found none."""
    shapes = [shape for shape, count in sorted(pods.nodes.items()) for _ in range(count)]
    free = [[WHOLE] * size for _, size in shapes]
    given, refused = 0.0, 0
    for pod in pods.arrivals:
        fitting = [
            index
            for index, gpus in enumerate(free)
            if (not pod.types or shapes[index][0] in pod.types)
            and sum(milli >= pod.milli for milli in gpus) >= pod.gpus
        ]
        if not fitting:
            refused += 1
            continue
        node = free[rule(pod, free, fitting)]
        node.sort()
        enough = [at for at, milli in enumerate(node) if milli >= pod.milli]
        for at in enough[: pod.gpus]:
            node[at] -= pod.milli
        given += pod.asked
    return given, refused


def all_at_once(pods: Pods) -> tuple[float, float, float]:
    """GPUs given out by the planner's solver, which knows all pods; the bound; seconds.

    Shares are first put together, largest first, with others that will do with the same types.
    """
    classes: Counter[tuple[int, float, frozenset[str]]] = Counter(_together(pods.arrivals))
    asked = sorted(classes, key=lambda each: (each[0], each[1], sorted(each[2])))
    kinds = sorted(pods.nodes)
    problem = Problem(
        columns=tuple(
            Column(model=model, group=group, gpus=size, rate=worth, price=size, tie=size)
            for model, (size, worth, types) in enumerate(asked)
            for group, (kind, gpus) in enumerate(kinds)
            if gpus >= size and (not types or kind in types)
        ),
        needs=tuple(Need(rate=0.0, least=0, most=classes[each]) for each in asked),
        groups=tuple(Nodes(pods.nodes[kind], kind[1]) for kind in kinds),
        objective="throughput",
    )
    found = select(problem, Limits(gap=1e-4))
    return -found.objective, min(-found.bound, pods.asked), found.seconds


def _together(arrivals: Sequence[Pod]) -> Iterator[tuple[int, float, frozenset[str]]]:
    """Whole pods as they are; shares as GPUs that hold several: size, what is used, types."""
    shares: defaultdict[frozenset[str], list[int]] = defaultdict(list)
    for pod in arrivals:
        if pod.milli == WHOLE:
            yield pod.gpus, float(pod.gpus), pod.types
        else:
            shares[pod.types] += [pod.milli] * pod.gpus
    for types, sizes in shares.items():
        free: list[int] = []
        for size in sorted(sizes, reverse=True):
            at = min(
                (at for at, left in enumerate(free) if left >= size),
                key=lambda at: free[at],
                default=-1,
            )
            if at < 0:
                free.append(WHOLE)
            free[at] -= size
        for left in free:
            yield 1, 1 - left / WHOLE, types


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path))
    return path.open(encoding="utf-8")
