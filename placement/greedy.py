"""The first answer: models that take most GPUs first, each in its best option with room."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from placement.packing import Places
from placement.problem import Column, Need, Problem, score


def first_answer(problem: Problem) -> tuple[int, ...]:
    """Replicas of each column. What is needed may be missed, what there is never exceeded.

    A model's columns are tried in their order; the first with room for all that is still needed
    is taken, else the one that can carry most, and so on with the rest. Where replicas run, the
    better of two answers: from what runs, and from nothing.
    """
    fresh = _served(problem, [0] * len(problem.columns))
    kept = _what_stays(problem)
    if fresh is None or not any(kept):
        return tuple(fresh or kept)
    grown = _served(problem, kept)
    answers = [answer for answer in (grown, fresh) if answer is not None]

    def rank(counts: Sequence[int]) -> tuple[bool, float]:
        return not problem.meets(counts), score(problem, counts)

    best: list[int] = min(answers, key=rank)
    return tuple(best)


def free_beside(problem: Problem, counts: Sequence[int]) -> list[Places] | None:
    """What `counts` leave of each group's nodes; None: they do not fit, put largest first."""
    free = [Places(nodes.nodes, nodes.gpus_per_node) for nodes in problem.groups]
    parts = [
        (gpus, group, count)
        for column, count in zip(problem.columns, counts, strict=True)
        for group, gpus in column.parts
    ]
    for gpus, group, count in sorted(parts, key=lambda part: -part[0]):
        if free[group].room(gpus) < count:
            return None
        free[group].take(gpus, count)
    return free


def _served(problem: Problem, counts: Sequence[int]) -> list[int] | None:
    """`counts` and what is still needed; None: they do not fit on the nodes."""
    free = free_beside(problem, counts)
    if free is None:
        return None
    counts = list(counts)
    models = sorted(range(len(problem.needs)), key=lambda model: (-_size(problem, model), model))
    for model in models:
        _serve(problem, model, free, counts)
    return counts


def _what_stays(problem: Problem) -> list[int]:
    """Of what runs, as much as is needed; what carries a request most dearly goes first."""
    counts = [
        min(column.running, problem.most(index)) for index, column in enumerate(problem.columns)
    ]
    for model, need in enumerate(problem.needs):
        mine = [index for index in problem.of_model(model) if counts[index]]
        mine.sort(key=lambda index: -problem.columns[index].price / problem.columns[index].rate)
        for index in mine:
            while counts[index]:
                counts[index] -= 1
                enough = problem.met(counts, model)
                if not enough and problem.replicas(counts, model) < need.most:
                    counts[index] += 1
                    break
    return counts


def _size(problem: Problem, model: int) -> int:
    return max(
        (problem.columns[index].all_gpus for index in problem.of_model(model)[:1]), default=0
    )


def _serve(problem: Problem, model: int, free: Sequence[Places], counts: list[int]) -> None:
    need = problem.needs[model]
    mine = [index for index in problem.of_model(model) if problem.columns[index].rate > 0]
    firm = [index for index in mine if not problem.columns[index].spot]
    if need.firm_rate > 0:
        missing = need.firm_rate - problem.rate(counts, model, firm_only=True)
        most = need.most - problem.replicas(counts, model)
        _take(problem, firm, Need(missing, 0, most), free, counts)
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
        rooms = [min(most, _room(problem.columns[index], free)) for index in columns]
        wanted = [_wanted(problem.columns[index], rate, least) for index in columns]
        enough = [at for at, room in enumerate(rooms) if 0 < wanted[at] <= room]
        at = enough[0] if enough else _roomiest(problem, columns, rooms)
        replicas = min(wanted[at], rooms[at])
        if replicas == 0:
            return
        chosen = problem.columns[columns[at]]
        for group, gpus in chosen.parts:
            free[group].take(gpus, replicas)
        counts[columns[at]] += replicas
        rate, least, most = rate - replicas * chosen.rate, least - replicas, most - replicas


def _room(column: Column, free: Sequence[Places]) -> int:
    """Replicas of a column that still fit; parts in one group share its room, largest first."""
    if not column.beside:
        return free[column.group].room(column.gpus)
    alike = Counter(group for group, _ in column.parts)
    largest: dict[int, int] = {}
    for group, gpus in column.parts:
        largest[group] = max(gpus, largest.get(group, 0))
    return min(free[group].room(gpus) // alike[group] for group, gpus in largest.items())


def _wanted(column: Column, rate: float, least: int) -> int:
    return max(least, math.ceil(rate / column.rate - 1e-9) if rate > 0 else 0)


def _roomiest(problem: Problem, columns: Sequence[int], rooms: Sequence[int]) -> int:
    """The column whose room carries most."""
    return max(
        range(len(columns)),
        key=lambda at: (rooms[at] * problem.columns[columns[at]].rate, rooms[at], -at),
    )
