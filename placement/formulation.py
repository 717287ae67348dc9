"""A problem as an integer program: replicas as columns, needs and room on nodes as rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from placement.milp import INFINITY, Answer, Program
from placement.packing import MOST_PATTERNS, divisible, patterns
from placement.problem import Column, Need, Problem, TwoSides
from placement.rounding import rounded

TIE = 1e-6  # of the objective: what breaks ties must not outweigh anything else
_SHORT = 1e-7  # relative: a demand that is missed by this much is met
_FIRST = 1e6  # which pair of a model is used: rounded before all else
_FEWER_SHORT = 10.0  # one model less that goes short, against the shares by which others do


class Formulation:
    """A problem written as an integer program.

    `soft`: needs may be missed, and only that costs. `load_factor`: demands are to be met so many
    times; for the objective `headroom` without it, that factor is a column, and what is maximised.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        soft: bool = False,
        load_factor: float | None = None,
        start: Sequence[int] | None = None,
    ) -> None:
        self.program = Program()
        self.exact = True
        self._tie = 0.0
        self._problem = problem
        self._soft = soft
        seeks = problem.objective == "headroom" and load_factor is None and not soft
        costs = self._costs(start, seeks=seeks)
        self._counts = [
            self.program.column(
                cost,
                upper=problem.most(index),
                follows=problem.columns[index].pair is not None,
            )
            for index, cost in enumerate(costs)
        ]
        self._pairs = [pair for model in range(len(problem.needs)) for pair in problem.pairs(model)]
        self._uses: dict[TwoSides, int] = {}  # whether a pair is used
        self._both: dict[TwoSides, int] = {}  # requests/s that both of its sides carry
        for model in range(len(problem.needs)):
            self._add_pairs(model, seeks=seeks)
        self._moves = self._add_moves(free=soft or seeks)
        self.load_factor = None
        if seeks and any(need.rate > 0 for need in problem.needs):
            self.load_factor = self.program.column(-1.0, whole=False)
        self._left: list[tuple[TwoSides, int]] = []  # after the loss of a node
        self._patterns: list[tuple[int, list[dict[int, int]]]] = []
        self._zoned = [] if soft else self._add_zones()
        for model, need in enumerate(problem.needs):
            self._add_need(model, need, load_factor or 1.0)
        for group in range(len(problem.groups)):
            self._add_room(group)

    def counts(self, answer: Answer) -> list[int]:
        """Replicas of each of the problem's columns."""
        return [round(answer.values[index]) for index in self._counts]

    def columns_of(self, model: int) -> list[int]:
        """The program's columns for replicas of a model."""
        return [self._counts[index] for index in self._problem.of_model(model)]

    def start(self, counts: Sequence[int] | None) -> list[float] | None:
        """Where the search begins: at `counts`, or nearer to the best if the program is large."""
        given = None if counts is None else self.point(counts)
        if not self.program.large:
            return given
        columns = self._problem.columns
        weights = [float(column.gpus) for column in columns]
        weights += [0.0] * (self.program.width - len(weights))
        for index in self._uses.values():
            weights[index] = _FIRST
        near = rounded(self.program, weights)
        points = [point for point in (given, near) if point is not None]
        return min(points, key=self.program.cost, default=None)

    def point(self, counts: Sequence[int]) -> list[float] | None:
        """`counts` as a value for each column; None where patterns would have to be found first."""
        if self._patterns:
            return None
        values = [float(count) for count in counts]
        for pair in self._pairs:
            carried = self._problem.pair_rate(counts, pair)
            values += [float(carried > 0), carried]
        values += [
            float(max(0, counts[index] - self._problem.columns[index].running))
            for index in self._moves
        ]
        if self.load_factor is not None:
            values.append(self._problem.load_factor(counts))
        values += [float(self._problem.in_one_zone(counts, model)) for model in self._zoned]
        values += [self._problem.left_of(counts, pair, group) for pair, group in self._left]
        return values

    def _costs(self, start: Sequence[int] | None, *, seeks: bool) -> list[float]:
        problem = self._problem
        if self._soft:
            return [0.0] * len(problem.columns)
        main = [
            0.0 if seeks else _worth(column) if problem.objective == "throughput" else column.price
            for column in problem.columns
        ]
        ties = [
            column.tie + (column.price if problem.objective == "throughput" else 0.0)
            for column in problem.columns
        ]
        counts = start or [1] * len(main)
        size = abs(sum(m * c for m, c in zip(main, counts, strict=True))) or 1.0
        tied = sum(t * c for t, c in zip(ties, counts, strict=True)) or 1.0
        self._tie = TIE * size / tied
        return [m + self._tie * t for m, t in zip(main, ties, strict=True)]

    def _add_pairs(self, model: int, *, seeks: bool) -> None:
        """For each pair of columns whether it is used, and what both sides carry; one pair at most."""
        problem, program = self._problem, self.program
        pays = problem.objective == "throughput" and not seeks and not self._soft
        for pair in problem.pairs(model):
            self._uses[pair] = uses = program.column(upper=1)
            self._both[pair] = both = program.column(
                -1.0 if pays else 0.0, whole=False, follows=True
            )
            for index in pair:
                count = self._counts[index]
                program.row([(count, 1.0), (uses, -1.0)], lower=0.0)
                program.row([(count, 1.0), (uses, -float(problem.most(index)))], upper=0.0)
                program.row([(count, problem.columns[index].rate), (both, -1.0)], lower=0.0)
        if len(problem.pairs(model)) > 1:
            program.row([(self._uses[pair], 1.0) for pair in problem.pairs(model)], upper=1.0)

    def _add_moves(self, *, free: bool) -> list[int]:
        """A column for each of the problem's that costs something to start: replicas not running."""
        moved = []
        for index, column in enumerate(self._problem.columns):
            if column.move > 0 and not free:
                new = self.program.column(column.move, whole=False)
                self.program.row([(self._counts[index], 1.0), (new, -1.0)], upper=column.running)
                moved.append(index)
        return moved

    def _add_zones(self) -> list[int]:
        """A small price for models whose replicas would all be in one zone; those models."""
        zoned = []
        for model in range(len(self._problem.needs)):
            zones = self._problem.zones(model)
            if not zones:
                continue
            zoned.append(model)
            alone = self.program.column(self._tie, upper=1)
            for zone in zones:
                others = [
                    (self._counts[index], 1.0)
                    for index in self._problem.answering(model)
                    if self._problem.columns[index].zone != zone
                ]
                self.program.row([*others, (alone, 1.0)], lower=1.0)
        return zoned

    def _add_need(self, model: int, need: Need, factor: float) -> None:
        problem = self._problem
        mine, pairs = problem.whole(model), problem.pairs(model)
        missed = None
        if self._soft:
            missed = self.program.column(_FEWER_SHORT * len(self._problem.needs), upper=1)
        short = self._share_of(missed)
        if need.rate > 0:
            self._add_rate(mine, pairs, need.rate, short, factor=factor)
            if self.load_factor is not None:
                carried = self._shares(mine, pairs, need.rate)
                self.program.row([*carried, (self.load_factor, -1.0)], lower=0.0)
        firm = [index for index in mine if not problem.columns[index].spot]
        both_firm = [
            pair for pair in pairs if not any(problem.columns[index].spot for index in pair)
        ]
        if need.firm_rate > 0 and len(firm) + len(both_firm) < len(mine) + len(pairs):
            self._add_rate(firm, both_firm, need.firm_rate, self._share_of(missed))
        self._add_after_loss(model, need, missed)
        self._add_replicas(model, need, short)

    def _add_replicas(self, model: int, need: Need, short: list[tuple[int, float]]) -> None:
        """At least so many that answer, at most so many with those that only read prompts."""
        problem = self._problem
        each = [(self._counts[index], 1.0) for index in problem.of_model(model)]
        answering = [(self._counts[index], 1.0) for index in problem.answering(model)]
        least = [(index, value * need.least) for index, value in short] if need.least else []
        if least or problem.pairs(model):
            self.program.row([*answering, *least], lower=need.least)
            self.program.row(each, upper=need.most)
        elif need.least > 0 or need.most < INFINITY:
            self.program.row(each, lower=need.least, upper=need.most)

    def _add_after_loss(self, model: int, need: Need, missed: int | None) -> None:
        """What must be left without any one node, whichever group it is of."""
        if not need.rate_after_loss and not need.replicas_after_loss:
            return
        problem, short = self._problem, self._share_of(missed)
        columns, mine = problem.columns, problem.of_model(model)
        for group in sorted({group for index in mine for group, _ in columns[index].parts}):
            left = {index: 1 - problem.share(index, group) for index in mine}
            if need.rate_after_loss:
                terms = [
                    (self._counts[index], columns[index].rate * left[index] / need.rate_after_loss)
                    for index in problem.whole(model)
                ]
                terms += [
                    (self._add_left(pair, group), 1 / need.rate_after_loss)
                    for pair in problem.pairs(model)
                ]
                self.program.row([*terms, *short], lower=1 - _SHORT)
            if need.replicas_after_loss:
                wanted = need.replicas_after_loss
                terms = [
                    (self._counts[index], left[index] / wanted)
                    for index in problem.answering(model)
                ]
                self.program.row([*terms, *short], lower=1 - _SHORT)

    def _add_left(self, pair: TwoSides, group: int) -> int:
        """A column of what both sides of a pair carry without a node of the group."""
        left = self.program.column(whole=False, follows=True)
        for index in pair:
            rate = self._problem.columns[index].rate * (1 - self._problem.share(index, group))
            self.program.row([(self._counts[index], rate), (left, -1.0)], lower=0.0)
        self._left.append((pair, group))
        return left

    def _share_of(self, missed: int | None) -> list[tuple[int, float]]:
        """The share of a need that may be missed, if the model may go short at all."""
        if missed is None:
            return []
        share = self.program.column(1.0, upper=1.0, whole=False)
        self.program.row([(share, 1.0), (missed, -1.0)], upper=0.0)
        return [(share, 1.0)]

    def _add_rate(
        self,
        columns: Sequence[int],
        pairs: Sequence[TwoSides],
        rate: float,
        short: list[tuple[int, float]],
        *,
        factor: float = 1.0,
    ) -> None:
        terms = self._shares(columns, pairs, rate)
        self.program.row([*terms, *short], lower=factor * (1 - _SHORT))

    def _shares(
        self, columns: Sequence[int], pairs: Sequence[TwoSides], rate: float
    ) -> list[tuple[int, float]]:
        """What a replica of each column carries of a demand, and each pair."""
        return [
            *((self._counts[at], self._problem.columns[at].rate / rate) for at in columns),
            *((self._both[pair], 1 / rate) for pair in pairs),
        ]

    def _add_room(self, group: int) -> None:
        """What fits on the group's nodes, see `placement.packing`."""
        by_size: defaultdict[int, Counter[int]] = defaultdict(
            Counter
        )  # places that a replica takes
        for index, column in enumerate(self._problem.columns):
            for other, size in column.parts:
                if other == group:
                    by_size[size][self._counts[index]] += 1
        nodes, gpus = self._problem.groups[group].nodes, self._problem.groups[group].gpus_per_node
        if divisible(by_size):
            for size in by_size:
                taken: Counter[int] = Counter()
                for larger, times in by_size.items():
                    if larger >= size:
                        for index, count in times.items():
                            taken[index] += count * (larger // size)
                self.program.row(taken.items(), upper=nodes * (gpus // size))
            return
        ways = patterns(by_size, gpus)
        self.exact = self.exact and len(ways) < MOST_PATTERNS
        used = [self.program.column(upper=nodes) for _ in ways]
        self.program.row([(index, 1.0) for index in used], upper=nodes)
        for size, times in by_size.items():
            places = [
                (index, -float(way[size]))
                for index, way in zip(used, ways, strict=True)
                if size in way
            ]
            self.program.row([*times.items(), *places], upper=0.0)
        self._patterns.append((group, ways))


def _worth(column: Column) -> float:
    """Of a replica where throughput counts: what one side of a pair carries is not carried yet."""
    return -column.rate if column.pair is None else 0.0
