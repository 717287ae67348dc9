"""The first answer: models that take most GPUs first, each in its best option with room."""

from __future__ import annotations

import math
from collections.abc import Sequence

from placement.packing import Places
from placement.problem import Column, Need, Problem


def first_answer(problem: Problem) -> tuple[int, ...]:
    """Replicas of each column. What is needed may be missed, what there is never exceeded.

    A model's columns are tried in their order; the first with room for all that is still needed
    is taken, else the one that can carry most, and so on with the rest.
    """
    free = [Places(nodes.nodes, nodes.gpus_per_node) for nodes in problem.groups]
    counts = [0] * len(problem.columns)
    models = sorted(range(len(problem.needs)), key=lambda model: (-_size(problem, model), model))
    for model in models:
        _serve(problem, model, free, counts)
    return tuple(counts)


def _size(problem: Problem, model: int) -> int:
    return max((problem.columns[index].gpus for index in problem.of_model(model)[:1]), default=0)


def _serve(problem: Problem, model: int, free: Sequence[Places], counts: list[int]) -> None:
    need = problem.needs[model]
    mine = [index for index in problem.of_model(model) if problem.columns[index].rate > 0]
    firm = [index for index in mine if not problem.columns[index].spot]
    if need.firm_rate > 0:
        _take(problem, firm, Need(need.firm_rate, 0, need.most), free, counts)
    left = Need(
        rate=need.rate - problem.rate(counts, model),
        least=need.least - problem.replicas(counts, model),
        most=need.most - problem.replicas(counts, model),
    )
    _take(problem, mine, left, free, counts)


def _take(
    problem: Problem,
    columns: Sequence[int],
    need: Need,
    free: Sequence[Places],
    counts: list[int],
) -> None:
    rate, least, most = need.rate, need.least, need.most
    while columns and most > 0 and (rate > 0 or least > 0):
        rooms = [
            min(most, free[problem.columns[index].group].room(problem.columns[index].gpus))
            for index in columns
        ]
        wanted = [_wanted(problem.columns[index], rate, least) for index in columns]
        enough = [at for at, room in enumerate(rooms) if 0 < wanted[at] <= room]
        at = enough[0] if enough else _roomiest(problem, columns, rooms)
        replicas = min(wanted[at], rooms[at])
        if replicas == 0:
            return
        chosen = problem.columns[columns[at]]
        free[chosen.group].take(chosen.gpus, replicas)
        counts[columns[at]] += replicas
        rate, least, most = rate - replicas * chosen.rate, least - replicas, most - replicas


def _wanted(column: Column, rate: float, least: int) -> int:
    return max(least, math.ceil(rate / column.rate - 1e-9) if rate > 0 else 0)


def _roomiest(problem: Problem, columns: Sequence[int], rooms: Sequence[int]) -> int:
    """The column whose room carries most."""
    return max(
        range(len(columns)),
        key=lambda at: (rooms[at] * problem.columns[columns[at]].rate, rooms[at], -at),
    )
