"""What a user does without a planner: the first GPUs that fit, or nodes of its own for each model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from placement.catalogue import Catalogue
from placement.fleet import FleetSpec
from placement.inventory import Inventory
from placement.memory import memory_use
from placement.node_groups import NodeGroup, node_groups
from placement.option import Option
from placement.options import find_options
from placement.packing import Places

GIB = 2**30


@dataclass(frozen=True, slots=True)
class ByHand:
    """A hand-made plan: what it costs, and which models it leaves short."""

    cost_per_hour: float
    gpus: int
    short: tuple[str, ...] = ()


def first_fit(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> ByHand:
    """GPUStack's rule: 1.2 x weights + 2 GiB must fit; fewest GPUs, first pool with room.

    As many replicas as the demand then needs, which is more than the rule itself would give.
    """
    groups, found = _options(fleet, inventory, catalogue)
    free = [Places(group.usable.nodes, group.usable.gpus_per_node) for group in groups]
    cost, gpus, short = 0.0, 0, []
    for options in found:
        options.sort(key=lambda option: (option.gpus_per_replica, option.group, _bits(option)))
        chosen = next(
            (o for o in options if _claim(o) and free[o.group].room(o.gpus_per_replica)), None
        )
        if chosen is None or chosen.capacity.concurrency == 0:
            short.append(chosen.candidate.model.name if chosen else "one that fits nowhere")
            continue
        room = free[chosen.group].room(chosen.gpus_per_replica)
        replicas = min(chosen.replicas, room)
        if replicas < chosen.replicas_needed:
            short.append(chosen.candidate.model.name)
        free[chosen.group].take(chosen.gpus_per_replica, replicas)
        gpus += replicas * chosen.gpus_per_replica
        cost += replicas * chosen.gpus_per_replica * chosen.price_per_gpu_hour
    return ByHand(cost, gpus, tuple(short))


def own_pools(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> ByHand | None:
    """Every model alone in one pool, the best of all such ways; None: there is none.

    With more models than pools, none can have a pool of its own.
    """
    groups, found = _options(fleet, inventory, catalogue)
    best: ByHand | None = None
    for pools in itertools.permutations(range(len(groups)), len(found)):
        chosen = [
            _cheapest_alone(options, groups, pool)
            for options, pool in zip(found, pools, strict=True)
        ]
        kept = [option for option in chosen if option is not None]
        if len(kept) < len(chosen):
            continue
        plan = ByHand(
            sum(option.price_per_hour for option in kept), sum(option.gpus for option in kept)
        )
        if best is None or plan.cost_per_hour < best.cost_per_hour:
            best = plan
    return best


def own_nodes(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> ByHand | None:
    """Every model on whole nodes of its own, which it pays for; models in the fleet's order."""
    groups, found = _options(fleet, inventory, catalogue)
    left = [group.usable.nodes for group in groups]
    cost, gpus = 0.0, 0
    for options in found:
        ways = []
        for option in options:
            nodes = groups[option.group].usable
            per_node = nodes.gpus_per_node // option.gpus_per_replica
            if option.capacity.concurrency == 0 or option.replicas < option.replicas_needed:
                continue
            count = math.ceil(option.replicas / per_node)
            if count <= left[option.group]:
                taken = count * nodes.gpus_per_node
                ways.append((taken * option.price_per_gpu_hour, taken, option.group, count))
        if not ways:
            return None
        price, taken, group, count = min(ways)
        left[group] -= count
        cost, gpus = cost + price, gpus + taken
    return ByHand(cost, gpus)


def _options(
    fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue
) -> tuple[Sequence[NodeGroup], list[list[Option]]]:
    """Ways to run each model whole on a node: rules of thumb know no others."""
    groups = node_groups(fleet, inventory, catalogue)
    return groups, [
        [
            option
            for option in find_options(wish, fleet, groups, catalogue).legal
            if len(option.parts) == 1 and option.candidate.role == "whole"
        ]
        for wish in fleet.models
    ]


def _cheapest_alone(
    options: Sequence[Option], groups: Sequence[NodeGroup], pool: int
) -> Option | None:
    nodes = groups[pool].usable
    fitting = [
        option
        for option in options
        if option.group == pool
        and option.capacity.concurrency > 0
        and option.replicas >= option.replicas_needed
        and option.replicas <= nodes.nodes * (nodes.gpus_per_node // option.gpus_per_replica)
    ]
    return min(fitting, key=lambda option: option.price_per_hour, default=None)


def _claim(option: Option) -> bool:
    use = memory_use(option.candidate).per_gpu
    ranks = option.candidate.num_ranks
    return 1.2 * use.weights_bytes * ranks + 2 * GIB <= use.total_bytes * ranks


def _bits(option: Option) -> int:
    """GPUStack is given one checkpoint: take the original before what was made of it."""
    return [each.source for each in option.candidate.model.checkpoints].index(
        option.candidate.checkpoint.source
    )
