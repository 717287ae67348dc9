"""From counted replicas to their GPUs: each part of a replica on a node, the parts put together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from placement.assignment import Wanted, assign
from placement.option import Option, Part
from placement.plan import NodeGpus, Plan, Variant
from placement.question import Question, running_here
from placement.shape import make_shape

ReplicaGpus = tuple[NodeGpus, ...]
Pools = tuple[str, ...]  # of the nodes that a replica spreads over
Chosen = tuple[int, Option, int]  # model, option, replicas
_Key = tuple[int, int]  # which of those chosen, which part of its replicas


def placements(
    question: Question, picked: Sequence[Chosen], running: Plan | None
) -> list[dict[Pools, tuple[ReplicaGpus, ...]]]:
    """For each option that was chosen, by pools, the GPUs of its replicas."""
    before = running.variants if running is not None else ()
    busy = frozenset((node.node, gpu) for node in _all_gpus(before) for gpu in node.gpus)
    placed: dict[_Key, tuple[NodeGpus, ...]] = {}
    pool_of: dict[str, str] = {}
    for index, group in enumerate(question.groups):
        pools = group.usable_nodes()
        pool_of.update(pools)
        keys = [
            (at, number)
            for at, chosen in enumerate(picked)
            for number, part in enumerate(chosen[1].parts)
            if part.group == index
        ]
        wanted = [
            _wanted(question, picked[at], number, before, key=key)
            for key, (at, number) in enumerate(keys)
        ]
        nodes = dict.fromkeys(pools, group.pool.gpus_per_node)
        for key, gpus in assign(nodes, wanted, busy).items():
            placed[keys[key]] = gpus
    found = []
    order = {node: index for index, node in enumerate(pool_of)}
    for at, chosen in enumerate(picked):
        columns = [placed[at, number] for number in range(len(chosen[1].parts))]
        there = _there(question, chosen, before) if len(columns) > 1 else []
        replicas = _put_together(chosen[1].parts, columns, there, order)
        found.append(_by_pools(chosen, replicas, pool_of))
    return found


def _by_pools(
    chosen: Chosen, replicas: Iterable[ReplicaGpus], pool_of: Mapping[str, str]
) -> dict[Pools, tuple[ReplicaGpus, ...]]:
    found: defaultdict[Pools, list[ReplicaGpus]] = defaultdict(list)
    for replica in replicas:
        pools = tuple(pool_of[node.node] for node in replica)
        found[pools].append(in_rank_order(replica))
    if not found:
        found[tuple(part.pool.name for part in chosen[1].parts)] = []
    return {pools: tuple(placed) for pools, placed in found.items()}


def _there(question: Question, chosen: Chosen, before: Sequence[Variant]) -> list[ReplicaGpus]:
    """Running replicas of what was chosen."""
    model, option, _ = chosen
    wish = question.options[model].wish
    return _nodes_of(running_here(option, wish, before, question.groups), option)


def in_rank_order(nodes: ReplicaGpus) -> ReplicaGpus:
    """A replica's nodes with as many GPUs in each entry: engines start as many ranks a node."""
    size = math.gcd(*(len(node.gpus) for node in nodes))
    return tuple(
        NodeGpus(node=node.node, gpus=node.gpus[first : first + size])
        for node in nodes
        for first in range(0, len(node.gpus), size)
    )


def _put_together(
    parts: Sequence[Part],
    columns: Sequence[Sequence[NodeGpus]],
    there: Sequence[ReplicaGpus],
    order: Mapping[str, int],
) -> Iterator[ReplicaGpus]:
    """Replicas of one part from each column: first those that run like that already.

    What is alike of the others comes from nodes that follow each other in `order`, so that few
    replicas mix pools.
    """
    kinds = [(part.group, part.gpus) for part in parts]
    free: defaultdict[tuple[int, int], list[NodeGpus]] = defaultdict(list)
    for kind, column in zip(kinds, columns, strict=True):
        free[kind] += column
    for replica in there:
        if all(part in free[kind] for kind, part in zip(kinds, replica, strict=True)):
            for kind, part in zip(kinds, replica, strict=True):
                free[kind].remove(part)
            yield replica
    waiting = {
        kind: iter(sorted(left, key=lambda part: (order[part.node], part.gpus)))
        for kind, left in free.items()
    }
    for _ in range(len(free[kinds[0]]) // kinds.count(kinds[0])):
        yield tuple(next(waiting[kind]) for kind in kinds)


def _nodes_of(variants: Sequence[Variant], option: Option) -> list[ReplicaGpus]:
    """Of running replicas, what each takes of each node; without those that are cut otherwise."""
    found = []
    for variant in variants:
        for replica in variant.placement:
            merged: dict[str, tuple[int, ...]] = {}
            for entry in replica:
                merged[entry.node] = (*merged.get(entry.node, ()), *entry.gpus)
            nodes = tuple(NodeGpus(node=node, gpus=gpus) for node, gpus in merged.items())
            if [len(node.gpus) for node in nodes] == [part.gpus for part in option.parts]:
                found.append(nodes)
    return found


def _wanted(
    question: Question, chosen: Chosen, number: int, before: Sequence[Variant], *, key: int
) -> Wanted:
    """The parts to place; those whose engines need not start anew stay where they are."""
    model, option, replicas = chosen
    wish = question.options[model].wish
    there = running_here(option, wish, before, question.groups)
    if there:
        flags = (
            option.shape or make_shape(option.candidate, extra_args=wish.engine_args)
        ).engine_args
        there = [variant for variant in there if variant.shape.engine_args == flags]
    return Wanted(
        key=key,
        model=wish.name
        if option.candidate.role == "whole"
        else f"{wish.name} {option.candidate.role}",
        gpus=option.parts[number].gpus,
        replicas=replicas,
        spread=wish.spread,
        parts=sum(part.group == option.parts[number].group for part in option.parts),
        running=tuple(nodes[number] for nodes in _staying(_nodes_of(there, option), chosen)),
    )


def _staying(there: list[ReplicaGpus], chosen: Chosen) -> list[ReplicaGpus]:
    """All, for each to be judged by its node; of replicas on several nodes, whole ones."""
    return there[: chosen[2]] if chosen[1].beside else there


def _all_gpus(variants: Sequence[Variant]) -> Iterator[NodeGpus]:
    for variant in variants:
        for replica in variant.placement:
            yield from replica
