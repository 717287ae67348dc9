"""Helix's single-site cluster with LLaMA-70B: layers over 24 unequal nodes, ours beside theirs.

    python -m loadtests.bench_helix

Nodes hold layers that follow each other; a token may enter a node at any layer that it holds. What
a placement carries is a maximum flow over layers, the same for all (Helix, ASPLOS 2025, without
its network limits, which 10 Gb/s are far from reaching: 16 KiB a token and hop). Node profiles and
placement are those of the paper's artifact (ablation/layouts/no_prune_24), tokens/s by the number
of layers held.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence

from placement.milp import Limits, Program

LAYERS = 80
LONGEST_STAGE = 14
NODES: Mapping[str, int] = {"A100-40": 4, "L4": 8, "T4": 12}
PROFILES: Mapping[str, tuple[float, ...]] = {
    "A100-40": (
        23833.87, 11384.25, 7201.41, 5264.62, 4096.65, 3124.14, 2595.68, 2045.64, 1754.38,
        1392.63, 1212.18, 952.11,
    ),
    "L4": (7557.86, 3625.71, 2171.88, 1476.08, 1017.57, 747.79, 531.70),
    "T4": (5709.21, 2434.37, 1347.87, 757.85),
}  # fmt: skip

Span = tuple[str, int, int]  # type, first layer, one beyond the last

# The artifact's nodes 2 to 25: first and last layer. Gurobi found it after 133 s.
_PUBLISHED = (
    (64, 75), (76, 79), (0, 11), (12, 23), (44, 47), (40, 43), (60, 63), (56, 59), (75, 75),
    (48, 51), (76, 79), (52, 55), (48, 51), (24, 27), (36, 39), (32, 35), (28, 31), (24, 27),
    (20, 23), (16, 19), (60, 63), (56, 59), (52, 55), (36, 39),
)  # fmt: skip
_PUBLISHED_TYPES = (
    *("A100-40",) * 4, *("L4",) * 2, *("T4",) * 8, *("L4",) * 6, *("T4",) * 4,
)  # fmt: skip


def main() -> int:
    """Print what each placement carries."""
    _say(f"LLaMA-70B on {', '.join(f'{count} x {kind}' for kind, count in NODES.items())}")
    _say(f"{'Helix (published)':<22}{flow(published()):8.1f} tokens/s")
    _say(f"{'Swarm':<22}{flow(equal_stages()):8.1f} tokens/s")
    alone = own_pipelines()
    told = (
        f"{sum(map(flow, alone)):8.1f} tokens/s" if alone else "    none: no type holds all layers"
    )
    _say(f"{'a pipeline a type':<22}{told}")
    started = time.perf_counter()
    ours = planned()
    seconds = time.perf_counter() - started
    _say(f"{'bora':<22}{flow(ours):8.1f} tokens/s, in {seconds:.1f} s")
    return 0


def published() -> list[Span]:
    """Helix's own placement."""
    return [
        (kind, first, last + 1)
        for kind, (first, last) in zip(_PUBLISHED_TYPES, _PUBLISHED, strict=True)
    ]


def flow(spans: Sequence[Span]) -> float:
    """Tokens/s that a placement carries: the maximum flow from layer 0 to the last."""
    program = Program()
    total = program.column(-1.0, whole=False)
    into: list[list[tuple[int, float]]] = [[] for _ in range(LAYERS + 1)]
    into[0].append((total, 1.0))
    into[LAYERS].append((total, -1.0))
    for kind, first, end in spans:
        entries = [program.column(whole=False) for _ in range(first, end)]
        rate = PROFILES[kind][end - first - 1]
        program.row(((entry, 1.0) for entry in entries), upper=rate)
        for layer, entry in zip(range(first, end), entries, strict=True):
            into[layer].append((entry, -1.0))
            into[end].append((entry, 1.0))
    for terms in into:
        program.row(terms, lower=0.0, upper=0.0)
    answer = program.solve(Limits())
    return 0.0 if answer is None else -answer.cost


def planned() -> list[Span]:
    """The placement of stages that carries most, by dynamic programming and bisection.

    A stage of so many layers is served by branches side by side; a branch is a chain of nodes of
    one type that share its layers out evenly.
    """
    tables = {length: _stage_rates(length) for length in range(1, LONGEST_STAGE + 1)}
    low, high = 0.0, 1e5
    best: list[Stage] = []
    while high - low > 1e-3 * max(low, 1.0):
        middle = (low + high) / 2
        found = _stages_for(middle, tables)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return _spans(best)


Used = tuple[int, ...]  # nodes of each type
Branch = tuple[str, int]  # type, nodes in a row
Stage = tuple[int, tuple[Branch, ...]]  # layers, branches
_KINDS = tuple(NODES)
_ALL = tuple(itertools.product(*(range(count + 1) for count in NODES.values())))


def _stage_rates(length: int) -> dict[Used, tuple[float, tuple[Branch, ...]]]:
    """The most that each set of nodes carries through a stage, and by which branches."""
    best: dict[Used, tuple[float, tuple[Branch, ...]]] = dict.fromkeys(_ALL, (0.0, ()))
    for at, kind in enumerate(_KINDS):
        for nodes in range(1, min(NODES[kind], length) + 1):
            held = -(-length // nodes)
            if held > len(PROFILES[kind]) or (nodes > 1 and -(-length // (nodes - 1)) == held):
                continue
            rate = PROFILES[kind][held - 1]
            for used in _ALL:  # in rising order: a branch may be taken again
                if used[at] < nodes:
                    continue
                before, branches = best[_less(used, at, nodes)]
                if before + rate > best[used][0]:
                    best[used] = before + rate, (*branches, (kind, nodes))
    return best


def _stages_for(
    rate: float, tables: Mapping[int, Mapping[Used, tuple[float, tuple[Branch, ...]]]]
) -> list[Stage] | None:
    """Stages over all layers that each carry `rate`; None: there are too few nodes."""
    ways = [
        (used, length, branches)
        for length, table in tables.items()
        for used, (carried, branches) in table.items()
        if carried >= rate and not _wasteful(used, table, rate)
    ]
    reach: dict[Used, tuple[int, list[Stage]]] = {_ALL[0]: (0, [])}
    for used in _ALL:  # in rising order
        if used not in reach:
            continue
        layers, stages = reach[used]
        for more, length, branches in ways:
            then = tuple(map(sum, zip(used, more, strict=True)))
            covered = min(LAYERS, layers + length)
            if any(one > most for one, most in zip(then, NODES.values(), strict=True)):
                continue
            if covered > reach.get(then, (0, []))[0]:
                reach[then] = covered, [*stages, (covered - layers, branches)]
    layers, stages = max(reach.values(), key=lambda entry: entry[0])
    return stages if layers == LAYERS else None


def _wasteful(
    used: Used, table: Mapping[Used, tuple[float, tuple[Branch, ...]]], rate: float
) -> bool:
    """Whether one node less would do."""
    return any(count > 0 and table[_less(used, at, 1)][0] >= rate for at, count in enumerate(used))


def _less(used: Used, at: int, nodes: int) -> Used:
    return (*used[:at], used[at] - nodes, *used[at + 1 :])


def _spans(stages: Sequence[Stage]) -> list[Span]:
    spans: list[Span] = []
    first = 0
    for length, branches in stages:
        for kind, nodes in branches:
            cuts = [first + length * index // nodes for index in range(nodes + 1)]
            spans += [(kind, one, two) for one, two in itertools.pairwise(cuts) if two > one]
        first += length
    return spans


def equal_stages() -> list[Span]:
    """Swarm's rule: stages as long as the smallest node holds; each node joins the weakest."""
    length = min(map(len, PROFILES.values()))
    carried = [0.0] * (LAYERS // length)
    spans = []
    for kind, count in NODES.items():
        for _ in range(count):
            weakest = carried.index(min(carried))
            carried[weakest] += PROFILES[kind][length - 1]
            spans.append((kind, weakest * length, (weakest + 1) * length))
    return spans


def own_pipelines() -> list[list[Span]]:
    """One pipeline of each type, its layers shared out evenly; none where they do not fit."""
    pipelines = []
    for kind, count in NODES.items():
        if count * len(PROFILES[kind]) < LAYERS:
            continue
        cuts = [LAYERS * index // count for index in range(count + 1)]
        pipelines.append([(kind, one, two) for one, two in itertools.pairwise(cuts)])
    return pipelines


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
