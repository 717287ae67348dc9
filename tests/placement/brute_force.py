"""The best plan by trying every one: slow, and too simple to be wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random

from placement.problem import Column, Need, Nodes, Problem, score


def best_of_all(problem: Problem) -> float | None:
    """The least score of all counts that meet all needs and fit; None: there are none."""
    scores = [
        score(problem, counts)
        for counts in _all_counts(problem)
        if problem.meets(counts) and fits(problem, counts)
    ]
    return min(scores, default=None)


def fewest_short(problem: Problem) -> int:
    """With how few models that do not get what they need one must live."""
    return min(
        sum(not problem.met(counts, model) for model in range(len(problem.needs)))
        for counts in _all_counts(problem)
        if fits(problem, counts)
    )


def fits(problem: Problem, counts: Sequence[int]) -> bool:
    """Whether the replicas can be put on nodes, by trying."""
    for group, nodes in enumerate(problem.groups):
        sizes = tuple(
            sorted(
                (
                    gpus
                    for column, count in zip(problem.columns, counts, strict=True)
                    for other, gpus in column.parts
                    for _ in range(count)
                    if other == group
                ),
                reverse=True,
            )
        )
        if not _packs(sizes, (nodes.gpus_per_node,) * nodes.nodes):
            return False
    return True


@cache
def _packs(sizes: tuple[int, ...], free: tuple[int, ...]) -> bool:
    if not sizes:
        return True
    return any(
        _packs(sizes[1:], tuple(sorted((*free[:at], room - sizes[0], *free[at + 1 :]))))
        for at, room in enumerate(free)
        if room >= sizes[0] and room not in free[:at]
    )


def _all_counts(problem: Problem) -> Iterator[tuple[int, ...]]:
    for counts in itertools.product(
        *(range(problem.most(index) + 1) for index in range(len(problem.columns)))
    ):
        if all(
            problem.replicas(counts, model) <= need.most for model, need in enumerate(problem.needs)
        ):
            yield counts


def _beside(
    random: Random, group: int, groups: int, sizes: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Now and then a replica takes GPUs of another group's nodes too."""
    if groups == 1 or random.random() < 0.8:
        return ()
    others = [other for other in range(groups) if other != group]
    return ((random.choice(others), random.choice(sizes)),)


def a_problem(random: Random, *, models: int, groups: int, most: int, **changes: object) -> Problem:
    """A problem with sizes that divide each other, or not; some have no solution."""
    sizes = random.choice([(1, 2, 4), (1, 2, 4, 8), (1, 2, 3), (2, 3, 5), (3, 4, 6)])
    columns = [
        Column(
            model=model,
            group=group,
            gpus=gpus,
            rate=round(gpus * random.uniform(0.6, 1.4), 2),
            price=round(gpus * (1 + group) * random.uniform(0.4, 1.1), 2),
            tie=gpus,
            spot=group == 1,
            running=random.choice([0, 0, 1]),
            move=random.choice([0.0, 0.0, 0.3]),
            beside=_beside(random, group, groups, sizes),
        )
        for model in range(models)
        for group in range(groups)
        for gpus in random.sample(sizes, random.randint(1, 2))
    ]
    needs = []
    for _ in range(models):
        least = random.choice([0, 0, 1, 2])
        rate = random.choice([0.0, round(random.uniform(0.5, 2.5 * most), 2)])
        firm = random.choice([0.0, 0.0, 0.5]) * rate
        needs.append(
            Need(
                rate=rate,
                least=least,
                most=max(most, least),
                firm_rate=firm,
                rate_after_loss=random.choice([0.0, 0.0, 0.0, 0.6]) * rate,
                replicas_after_loss=random.choice([0, 0, 0, 1]) if least > 1 else 0,
            )
        )
    fields: dict[str, object] = {"objective": random.choice(["cost", "throughput", "headroom"])}
    return Problem(
        columns=tuple(columns),
        needs=tuple(needs),
        groups=tuple(
            Nodes(nodes=random.randint(1, 2), gpus_per_node=random.choice([2, 3, 4, 8]))
            for _ in range(groups)
        ),
        **{**fields, **changes},  # type: ignore[arg-type]
    )
