"""What is to be solved, as numbers: options as columns, needs of models, counted nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from placement.routing_policy import Role

MET = 1 - 1e-6  # of a demand: the rest is the solver's tolerance


@dataclass(frozen=True, slots=True)
class Column:
    """An option of one model on a group of nodes; everything is per replica.

    A replica whose stages stand on several nodes takes `gpus` of one of `group`, and those of
    `beside`, each of another node. A column that does one part of the work belongs to a `pair`, with
    the column that does the other; of a model's pairs one is used at most.
    """

    model: int
    group: int
    gpus: int
    rate: float  # requests/s within the service level; 0: it cannot run
    price: float  # per hour
    tie: float = 0.0  # less is better where nothing else differs
    spot: bool = False
    zone: str = ""
    running: int = 0  # replicas that are there already
    move: float = 0.0  # what starting one beyond them costs, in the objective's unit
    beside: tuple[tuple[int, int], ...] = ()  # group and GPUs of each further node of a replica
    role: Role = "whole"
    pair: int | None = None  # a number of the problem's; None: it does all of the work

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Group and GPUs of each node that a replica takes GPUs of."""
        return ((self.group, self.gpus), *self.beside)

    @property
    def all_gpus(self) -> int:
        """Of a replica, on all its nodes."""
        return self.gpus + sum(gpus for _, gpus in self.beside)


class TwoSides(NamedTuple):
    """Indices of the two columns of a pair."""

    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class Need:
    """What one model must get."""

    rate: float  # requests/s of all replicas together
    least: int  # replicas that answer
    most: int  # replicas
    firm_rate: float = 0.0  # requests/s that must not be on spot nodes
    spread: bool = False  # over zones, where that costs nothing
    rate_after_loss: float = 0.0  # requests/s without any one node, if replicas are spread evenly
    replicas_after_loss: int = 0  # the same in replicas


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes that are alike, and may be used."""

    nodes: int
    gpus_per_node: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Choose replicas of columns, so that every model's need is met, best by the objective."""

    columns: tuple[Column, ...]
    needs: tuple[Need, ...]
    groups: tuple[Nodes, ...]
    objective: Literal["cost", "throughput", "headroom"] = "cost"
    _mine: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False, default=())
    _pairs: tuple[tuple[TwoSides, ...], ...] = field(
        init=False, repr=False, compare=False, default=()
    )

    def __post_init__(self) -> None:
        mine: list[list[int]] = [[] for _ in self.needs]
        sides: dict[int, dict[Role, int]] = {}
        for index, column in enumerate(self.columns):
            mine[column.model].append(index)
            if column.pair is not None:
                sides.setdefault(column.pair, {})[column.role] = index
        pairs: list[list[TwoSides]] = [[] for _ in self.needs]
        for each in sides.values():
            found = TwoSides(each["prefill"], each["decode"])
            pairs[self.columns[found.decode].model].append(found)
        object.__setattr__(self, "_mine", tuple(tuple(indices) for indices in mine))
        object.__setattr__(self, "_pairs", tuple(tuple(each) for each in pairs))

    @property
    def size(self) -> int:
        """Columns among which there is to choose; the two of a pair are one choice."""
        return sum(column.role != "decode" for column in self.columns)

    def of_model(self, model: int) -> tuple[int, ...]:
        """Indices of a model's columns."""
        return self._mine[model]

    def whole(self, model: int) -> list[int]:
        """Indices of a model's columns that do all of the work."""
        return [index for index in self._mine[model] if self.columns[index].pair is None]

    def pairs(self, model: int) -> tuple[TwoSides, ...]:
        """A model's pairs of columns that do a part of the work each."""
        return self._pairs[model]

    def pair_rate(self, counts: Sequence[int], pair: TwoSides) -> float:
        """Requests/s that both sides carry."""
        return min(counts[index] * self.columns[index].rate for index in pair)

    def most(self, index: int) -> int:
        """Replicas of a column that its model and its nodes allow, were it alone."""
        column = self.columns[index]
        if column.rate <= 0:
            return 0
        rooms = [self._room(column, group, gpus) for group, gpus in set(column.parts)]
        return min(self.needs[column.model].most, *rooms)

    def _room(self, column: Column, group: int, size: int) -> int:
        """Replicas of a column for which a group has places of `size` GPUs, see `placement.packing`."""
        nodes = self.groups[group]
        places = nodes.nodes * (nodes.gpus_per_node // size)
        each = sum(gpus // size for other, gpus in column.parts if other == group)
        return places // each

    def rate(self, counts: Sequence[int], model: int, *, firm_only: bool = False) -> float:
        """Requests/s that a model's replicas carry."""
        columns = self.columns
        return sum(
            counts[index] * columns[index].rate
            for index in self.of_model(model)
            if columns[index].pair is None and not (firm_only and columns[index].spot)
        ) + sum(
            self.pair_rate(counts, pair)
            for pair in self.pairs(model)
            if not (firm_only and any(columns[index].spot for index in pair))
        )

    def replicas(self, counts: Sequence[int], model: int) -> int:
        """That answer, in all of a model's options that carry something."""
        whole = sum(
            counts[index]
            for index in self.of_model(model)
            if self.columns[index].pair is None and self.columns[index].rate > 0
        )
        return whole + sum(
            counts[pair.decode] for pair in self.pairs(model) if self.pair_rate(counts, pair) > 0
        )

    def engines(self, counts: Sequence[int], model: int) -> int:
        """Replicas of a model, with those that only read prompts."""
        return sum(counts[index] for index in self.of_model(model) if self.columns[index].rate > 0)

    def fits_roles(self, counts: Sequence[int], model: int) -> bool:
        """Whether one pair at most is used, with replicas on both sides."""
        used = [pair for pair in self.pairs(model) if any(counts[index] for index in pair)]
        return not used or (len(used) == 1 and all(counts[index] for index in used[0]))

    def met(self, counts: Sequence[int], model: int) -> bool:
        """Whether a model gets what it needs."""
        need = self.needs[model]
        return (
            self.rate(counts, model) >= need.rate * MET
            and self.rate(counts, model, firm_only=True) >= need.firm_rate * MET
            and self.replicas(counts, model) >= need.least
            and self.fits_roles(counts, model)
            and self.after_loss(counts, model) >= need.rate_after_loss * MET
            and self.after_loss(counts, model, replicas=True) >= need.replicas_after_loss * MET
        )

    def after_loss(self, counts: Sequence[int], model: int, *, replicas: bool = False) -> float:
        """Requests/s (or replicas) that are left, at most, when the fullest node is lost.

        Of a group's equal nodes one has at least its share.
        """
        mine = [index for index in self.of_model(model) if counts[index]]
        groups = {group for index in mine for group, _ in self.columns[index].parts}
        if replicas:
            answering = [index for index in self.answering(model) if counts[index]]
            left = (
                sum(counts[index] * (1 - self.share(index, group)) for index in answering)
                for group in groups
            )
            return min(left, default=0.0)
        whole = [index for index in mine if self.columns[index].pair is None]
        rates = (
            sum(counts[i] * self.columns[i].rate * (1 - self.share(i, group)) for i in whole)
            + sum(self.left_of(counts, pair, group) for pair in self.pairs(model))
            for group in groups
        )
        return min(rates, default=0.0)

    def left_of(self, counts: Sequence[int], pair: TwoSides, group: int) -> float:
        """Requests/s that both sides of a pair carry without a node of the group."""
        return min(
            counts[index] * self.columns[index].rate * (1 - self.share(index, group))
            for index in pair
        )

    def share(self, index: int, group: int) -> float:
        """Of a column's replicas, those that one of the group's nodes has if they are spread."""
        parts = sum(other == group for other, _ in self.columns[index].parts)
        return min(1.0, parts / max(1, self.groups[group].nodes))

    def meets(self, counts: Sequence[int]) -> bool:
        """Whether every model gets what it needs."""
        return all(self.met(counts, model) for model in range(len(self.needs)))

    def answering(self, model: int) -> list[int]:
        """Indices of a model's columns that write answers."""
        return [index for index in self._mine[model] if self.columns[index].role != "prefill"]

    def zones(self, model: int) -> tuple[str, ...]:
        """Over which a model's replicas should be spread; none where there is no choice."""
        zones = sorted({self.columns[index].zone for index in self.answering(model)})
        need = self.needs[model]
        return tuple(zones) if need.spread and need.most > 1 and len(zones) > 1 else ()

    def in_one_zone(self, counts: Sequence[int], model: int) -> bool:
        """Whether the loss of one zone would take all of a model's replicas."""
        used = {self.columns[index].zone for index in self.answering(model) if counts[index]}
        return len(used) <= 1

    def load_factor(self, counts: Sequence[int]) -> float:
        """How many times the demand could grow before the first model is full."""
        return min(
            (
                self.rate(counts, model) / need.rate
                for model, need in enumerate(self.needs)
                if need.rate > 0
            ),
            default=math.inf,
        )


def score(problem: Problem, counts: Sequence[int]) -> float:
    """The objective's value; less is better.

    cost: the price per hour, and what new replicas cost to start. throughput: requests/s of all
    models, negative. headroom: the demand's share of the capacity, of the fullest model.
    """
    if problem.objective == "headroom":
        factor = problem.load_factor(counts)
        return 1 / factor if factor > 0 else math.inf
    moves = sum(
        max(0, count - column.running) * column.move
        for count, column in zip(counts, problem.columns, strict=True)
    )
    if problem.objective == "throughput":
        return moves - sum(problem.rate(counts, model) for model in range(len(problem.needs)))
    prices = (count * c.price for count, c in zip(counts, problem.columns, strict=True))
    return moves + sum(prices)
