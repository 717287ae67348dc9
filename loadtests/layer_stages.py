"""Where to put layers on unequal nodes: stages that all carry as much, found by column generation.

A stage of so many layers is served by branches side by side; a branch is a chain of nodes of one
kind that share its layers out evenly. For a wanted rate, an integer program chooses how many stages
of which form cover most layers with the nodes that there are; its columns are priced in one by one,
each the cheapest set of branches for a length by dynamic programming (Gilmore and Gomory 1961, with
covering in place of packing). The highest rate that covers all layers is found by bisection.

Between regions a link carries far less than a node. There, stages stay inside a region, and one with
enough branches to spread over as many links stands at each border.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtests.helix_clusters import Cluster, Kind, Span
from loadtests.layer_flow import flow
from placement.milp import Limits, Program

_UNITS = 120  # in which a rate is counted when branches are put together
_CLOSE = 0.002  # relative: when the bisection ends
_WORTH_A_TRY = 0.95  # of what is reached: stages for less hardly ever carry more
_ROUNDS = 60  # of pricing, at most
_UNWANTED = 1e3  # layers that a missing wide stage costs
_LIMITS = Limits(time_s=3.0, gap=0.001, nodes=3000)


@dataclass(frozen=True, slots=True)
class Branch:
    """A chain of nodes of one kind, and what it carries through the stage's layers."""

    kind: Kind
    nodes: int
    rate: float


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers, and the branches that serve them."""

    length: int
    branches: tuple[Branch, ...]

    def nodes(self, kind: Kind) -> int:
        """Of that kind, in all branches."""
        return sum(branch.nodes for branch in self.branches if branch.kind == kind)


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a stage may be made of, for a rate."""

    cluster: Cluster
    rate: float
    places: tuple[Mapping[Kind, int], ...]  # node counts inside which a stage stays
    wide: int  # branches of a stage at a border
    borders: int


def planned(cluster: Cluster) -> list[Span]:
    """The placement that carries most."""
    low, high = 0.0, _endless(cluster)
    best: list[Span] = []
    carried = 0.0
    while high - low > _CLOSE * high:
        rate = (low + high) / 2
        stages = _stages(_rules(cluster, rate))
        if stages is None:
            high = rate
            continue
        low = rate
        if rate < _WORTH_A_TRY * carried:
            continue
        for spans in _orders(cluster, stages):
            reached = flow(cluster, spans)
            if reached > carried:
                best, carried = spans, reached
    return best


def _endless(cluster: Cluster) -> float:
    """What no placement exceeds: every node at the number of layers that it serves best."""
    total = sum(
        count * max(held * rate for held, rate in enumerate(cluster.rates_of(kind), start=1))
        for kind, count in cluster.nodes.items()
    )
    return total / cluster.layers


def _rules(cluster: Cluster, rate: float) -> _Rules:
    if cluster.between_regions is None:
        return _Rules(cluster, rate, (cluster.nodes,), wide=1, borders=0)
    regions = sorted({kind.region for kind in cluster.nodes})
    places = tuple(
        {kind: count for kind, count in cluster.nodes.items() if kind.region == region}
        for region in regions
    )
    wide = math.ceil(rate / cluster.between_regions)
    return _Rules(cluster, rate, places, wide=wide, borders=len(regions) - 1 if wide > 1 else 0)


def _stages(rules: _Rules) -> list[Stage] | None:
    """Stages over all layers that each carry the rate; None: none were found."""
    known = dict.fromkeys(_uniform_stages(rules))
    for _ in range(_ROUNDS):
        answer = _cover(rules, list(known), whole=False)
        fresh = [stage for stage in _priced(rules, answer.prices) if stage not in known]
        if not fresh:
            break
        known.update(dict.fromkeys(fresh))
    if -answer.cost < rules.cluster.layers - 1e-6:
        return None
    stages = list(known)
    values = _cover(rules, stages, whole=True).values[: len(stages)]
    chosen = [
        stage for stage, times in zip(stages, values, strict=True) for _ in range(round(times))
    ]
    if sum(stage.length for stage in chosen) < rules.cluster.layers:
        return None
    if sum(len(stage.branches) >= rules.wide for stage in chosen) < rules.borders:
        return None
    return chosen


@dataclass(frozen=True, slots=True)
class _Covered:
    cost: float
    values: tuple[float, ...]
    prices: tuple[float, ...]


def _cover(rules: _Rules, stages: Sequence[Stage], *, whole: bool) -> _Covered:
    """How often to take each stage, to cover most layers."""
    program = Program()
    taken = [program.column(-float(stage.length), whole=whole) for stage in stages]
    missing = program.column(_UNWANTED, whole=False)
    for kind, count in rules.cluster.nodes.items():
        used = ((index, float(s.nodes(kind))) for index, s in zip(taken, stages, strict=True))
        program.row(used, upper=count)
    wide = [
        (index, 1.0)
        for index, stage in zip(taken, stages, strict=True)
        if len(stage.branches) >= rules.wide
    ]
    program.row([*wide, (missing, 1.0)], lower=rules.borders)
    answer = program.solve(_LIMITS)
    if answer is None:
        return _Covered(0.0, (0.0,) * len(stages), ())
    return _Covered(answer.cost, answer.values, answer.prices)


def _uniform_stages(rules: _Rules) -> Iterator[Stage]:
    """Stages of equal branches."""
    for length in range(1, rules.cluster.layers + 1):
        for place in rules.places:
            for branch in _branches(rules.cluster, place, length):
                enough = math.ceil(rules.rate / branch.rate)
                for times in {enough, max(enough, rules.wide)}:
                    if times * branch.nodes <= place[branch.kind]:
                        yield Stage(length, (branch,) * times)


def _branches(cluster: Cluster, place: Mapping[Kind, int], length: int) -> list[Branch]:
    """Chains that hold `length` layers; longer ones only where they carry more."""
    found = []
    for kind, count in place.items():
        rates, best = cluster.rates_of(kind), 0.0
        fewest = -(-length // len(rates))
        for nodes in range(fewest, min(count, length) + 1):
            rate = rates[-(-length // nodes) - 1]
            if rate > best:
                best = rate
                found.append(Branch(kind, nodes, best))
    return found


def _priced(rules: _Rules, prices: Sequence[float]) -> Iterator[Stage]:
    """For each length the stage that is worth most beyond its nodes' prices, if anything."""
    price = {kind: -value for kind, value in zip(rules.cluster.nodes, prices, strict=False)}
    bonus = max(0.0, -prices[-1]) if prices and rules.borders else 0.0
    for length in range(1, rules.cluster.layers + 1):
        for place in rules.places:
            branches = _branches(rules.cluster, place, length)
            for least, worth in {(1, 0.0), (rules.wide if rules.borders else 1, bonus)}:
                found = _cheapest(branches, price, rules.rate, least)
                if found is None or found[0] > length + worth - 1e-6:
                    continue
                stage = Stage(length, found[1])
                if all(stage.nodes(kind) <= count for kind, count in place.items()):
                    yield stage


def _cheapest(
    branches: Sequence[Branch], price: Mapping[Kind, float], rate: float, least: int
) -> tuple[float, tuple[Branch, ...]] | None:
    """The cheapest set of at least so many branches that carries the rate, by units of it."""
    units = [min(_UNITS, int(branch.rate / rate * _UNITS + 1e-9)) for branch in branches]
    costs = [price[branch.kind] * branch.nodes for branch in branches]
    items = list(zip(range(len(branches)), units, costs, strict=True))
    best = {(0, 0): (0.0, -1)}
    for left, more in itertools.product(range(_UNITS + 1), range(least + 1)):
        if left == more == 0:
            continue
        least_cost, chosen_index = math.inf, -1
        fewer = more - 1 if more else 0
        for index, unit, cost in items:
            total = best[left - unit if left > unit else 0, fewer][0] + cost
            if total < least_cost and (unit or not left):
                least_cost, chosen_index = total, index
        best[left, more] = least_cost, chosen_index
    left, more, chosen = _UNITS, least, []
    if math.isinf(best[left, more][0]):
        return None
    while left or more:
        index = best[left, more][1]
        chosen.append(branches[index])
        left, more = max(0, left - units[index]), max(0, more - 1)
    order = sorted(chosen, key=lambda branch: (branch.kind, branch.nodes))
    return best[_UNITS, least][0], tuple(order)


def _orders(cluster: Cluster, stages: Sequence[Stage]) -> Iterator[list[Span]]:
    """Stages in a row, region after region, the widest first or last in each; layers cut to fit."""
    by_region: dict[int, list[Stage]] = {}
    for stage in sorted(stages, key=lambda each: -len(each.branches)):
        by_region.setdefault(stage.branches[0].kind.region, []).append(stage)
    for regions in itertools.permutations(by_region):
        for ends in itertools.product((False, True), repeat=len(regions)):
            row: list[Stage] = []
            for region, last in zip(regions, ends, strict=True):
                widest, *others = by_region[region]
                row += [*reversed(others), widest] if last else [widest, *others]
            yield from _cut_to_fit(cluster, row)
            if cluster.between_regions is None:
                return


def _cut_to_fit(cluster: Cluster, row: Sequence[Stage]) -> Iterator[list[Span]]:
    """Layers beyond the model's are taken from one stage: of two regions the longest, else each."""
    beyond = sum(stage.length for stage in row) - cluster.layers
    longest = max(range(len(row)), key=lambda at: row[at].length)
    each = cluster.between_regions is None and beyond > 0
    for at in range(len(row)) if each else (longest,):
        if row[at].length > beyond:
            lengths = [stage.length - (beyond if i == at else 0) for i, stage in enumerate(row)]
            yield _spans(row, lengths)


def _spans(row: Sequence[Stage], lengths: Sequence[int]) -> list[Span]:
    spans: list[Span] = []
    first = 0
    for stage, length in zip(row, lengths, strict=True):
        for branch in stage.branches:
            cuts = [first + length * index // branch.nodes for index in range(branch.nodes + 1)]
            spans += [
                Span(branch.kind, one, two) for one, two in itertools.pairwise(cuts) if two > one
            ]
        first += length
    return spans
