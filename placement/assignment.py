"""Which GPUs each replica gets: counted replicas onto named nodes.

What runs stays where it is as long as everything else fits. Larger replicas first, then those of
models that have few; of a model's replicas no node gets more than a quarter (of two or three: one)
where there is room elsewhere, so that the loss of a node is bearable; then the fullest node that has
room, so that whole nodes stay free; GPUs that lie together, from an index that their number divides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from placement.milp import Limits, Program
from placement.packing import divisible, fill_nodes, patterns
from placement.plan import NodeGpus


@dataclass(frozen=True, slots=True)
class Wanted:
    """Replicas of one option on a group of equal nodes."""

    key: int  # names the option in the answer
    model: str
    gpus: int
    replicas: int
    spread: bool = True  # over nodes, where there is room
    parts: int = 1  # of a replica on several nodes, of which this is one
    running: tuple[NodeGpus, ...] = ()  # where replicas of it are now


@dataclass(slots=True)
class _Replica:
    key: int
    model: str
    node: str
    gpus: tuple[int, ...]


@dataclass(slots=True)
class _Nodes:
    """Free GPUs of each node, and what is on it."""

    free: dict[str, list[int]]
    share: dict[str, int]  # of a model's replicas, for one node
    busy: frozenset[tuple[str, int]]  # GPUs of what runs and will go
    placed: dict[str, list[_Replica]] = field(default_factory=dict)
    models: Counter[tuple[str, str]] = field(default_factory=Counter)

    def put(self, wanted: Wanted, node: str, gpus: Sequence[int]) -> None:
        """Give these GPUs to a replica."""
        self.free[node] = [gpu for gpu in self.free[node] if gpu not in gpus]
        replica = _Replica(wanted.key, wanted.model, node, tuple(gpus))
        self.placed.setdefault(node, []).append(replica)
        self.models[wanted.model, node] += 1

    def evict(self, replica: _Replica) -> None:
        """Take its GPUs back."""
        self.placed[replica.node].remove(replica)
        self.free[replica.node] = sorted([*self.free[replica.node], *replica.gpus])
        self.models[replica.model, replica.node] -= 1


def assign(
    nodes: Mapping[str, int],
    wanted: Sequence[Wanted],
    busy: frozenset[tuple[str, int]] = frozenset(),
) -> dict[int, tuple[NodeGpus, ...]]:
    """GPUs of each replica, by key; `nodes` are the group's with their numbers of GPUs.

    What is new starts on GPUs that are not `busy` where it can, so that it need not wait for
    what goes.

    Raises:
        ValueError: the replicas do not fit.
    """
    share = _shares(wanted)
    state = _Nodes({name: list(range(gpus)) for name, gpus in nodes.items()}, share, busy)
    try:
        _place(state, wanted)
    except ValueError:
        if divisible({each.gpus for each in wanted if each.replicas}):
            raise
        state = _Nodes({name: list(range(gpus)) for name, gpus in nodes.items()}, share, busy)
        _place_by_patterns(state, wanted)
    found: dict[int, list[NodeGpus]] = {each.key: [] for each in wanted}
    for name in nodes:
        for replica in sorted(state.placed.get(name, ()), key=lambda each: each.gpus):
            found[replica.key].append(NodeGpus(node=name, gpus=replica.gpus))
    return {key: tuple(replicas) for key, replicas in found.items()}


def _shares(wanted: Sequence[Wanted]) -> dict[str, int]:
    replicas: defaultdict[str, float] = defaultdict(float)
    for each in wanted:
        replicas[each.model] += each.replicas / each.parts
    return {model: max(1, -(-round(count) // 4)) for model, count in replicas.items()}


def _place(state: _Nodes, wanted: Sequence[Wanted]) -> None:
    by_key = {each.key: each for each in wanted}
    left = {each.key: each.replicas - _keep(state, each) for each in wanted}
    while True:
        waiting = [by_key[key] for key, count in left.items() if count > 0]
        if not waiting:
            return
        # Of equal size those first whose model has few replicas: they need unlike nodes most.
        largest = max(waiting, key=lambda each: (each.gpus, -state.share[each.model], -each.key))
        node = _best_node(state, largest)
        if node is None:
            for replica in _in_the_way(state, largest.gpus):
                state.evict(replica)
                left[replica.key] += 1
            continue
        state.put(largest, node, _together(state, node, largest.gpus))
        left[largest.key] -= 1


def _keep(state: _Nodes, wanted: Wanted) -> int:
    """Leave what runs where it is, as many as are wanted; those that share a node go first."""
    here = [
        place
        for place in wanted.running
        if len(place.gpus) == wanted.gpus and set(place.gpus) <= set(state.free.get(place.node, ()))
    ]
    on_node = Counter(place.node for place in here)
    here.sort(key=lambda place: (on_node[place.node], place.node, place.gpus))
    kept = 0
    for place in here[: wanted.replicas]:
        if set(place.gpus) <= set(state.free[place.node]):
            state.put(wanted, place.node, place.gpus)
            kept += 1
    return kept


def _best_node(state: _Nodes, wanted: Wanted) -> str | None:
    best: tuple[int, bool, int] | None = None
    chosen = None
    for name, free in state.free.items():
        if len(free) < wanted.gpus:
            continue
        idle = len(free)
        if state.busy:
            idle -= sum((name, gpu) in state.busy for gpu in free)
        beyond = state.models[wanted.model, name] + 1 - state.share[wanted.model]
        rank = (max(0, beyond) if wanted.spread else 0, idle < wanted.gpus, len(free))
        if best is None or rank < best:
            best, chosen = rank, name
        if rank == (0, False, wanted.gpus):
            break
    return chosen


def _in_the_way(state: _Nodes, size: int) -> list[_Replica]:
    """The smaller replicas whose going makes room for `size`, where fewest GPUs must move.

    Raises:
        ValueError: there is no such node.
    """
    best: tuple[int, list[_Replica]] | None = None
    for name, free in state.free.items():
        smaller = sorted(
            (each for each in state.placed.get(name, ()) if len(each.gpus) < size),
            key=lambda each: len(each.gpus),
        )
        going: list[_Replica] = []
        room = len(free)
        for replica in smaller:
            if room >= size:
                break
            going.append(replica)
            room += len(replica.gpus)
        moved = sum(len(replica.gpus) for replica in going)
        if room >= size and (best is None or moved < best[0]):
            best = moved, going
    if best is None or not best[1]:
        raise ValueError(f"no node has room for {size} GPUs")
    return best[1]


def _together(state: _Nodes, node: str, size: int) -> tuple[int, ...]:
    """Idle GPUs that lie together where there are such; else the first idle ones, then others."""
    free = state.free[node]
    idle = {gpu for gpu in free if (node, gpu) not in state.busy}
    for first in sorted(idle):
        block = range(first, first + size)
        if first % size == 0 and idle.issuperset(block):
            return tuple(block)
    return tuple(sorted(sorted(free, key=lambda gpu: (gpu not in idle, gpu))[:size]))


def _place_by_patterns(state: _Nodes, wanted: Sequence[Wanted]) -> None:
    """Sizes that do not divide each other: find patterns for the nodes, then fill them."""
    counts: Counter[int] = Counter()
    for each in wanted:
        counts[each.gpus] += each.replicas
    per_node = len(next(iter(state.free.values())))
    ways = patterns([size for size, count in counts.items() if count], per_node)
    program = Program()
    used = [program.column(1.0) for _ in ways]
    for size, count in counts.items():
        places = ((index, float(way.get(size, 0))) for index, way in zip(used, ways, strict=True))
        program.row(places, lower=count)
    answer = program.solve(Limits())
    if answer is None or answer.cost > len(state.free) + 0.5:
        raise ValueError("the replicas do not fit on the nodes")
    times = [round(value) for value in answer.values]
    filled = fill_nodes(counts, list(zip(ways, times, strict=True)))
    left = {each.key: each.replicas for each in wanted}
    for name, node_sizes in zip(state.free, filled, strict=False):
        for size in sorted(node_sizes, reverse=True):
            fitting = [each for each in wanted if each.gpus == size and left[each.key] > 0]
            chosen = min(fitting, key=lambda each: state.models[each.model, name])
            state.put(chosen, name, _together(state, name, size))
            left[chosen.key] -= 1
