"""On which nodes the gangs of a variant belong: those of the plan, as long as these are to be had.

Serve takes one wish for all replicas of a deployment, when it is created. So a gang has several
places, each with a wish of its own, and Serve runs each as a deployment: place 1 for one gang on
the nodes of the first planned replica, place 2 for one on those of the second, and so on, and place
0 for gangs beyond the plan's. A place's nodes are let go, by creating it anew, only while its gang
does not run. No Ray, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.generations import RUNNING, STOPPING, Census, Deployed, bundle, key_of
from cluster.placement_check import NodeFacts
from placement.plan import Variant

PATIENCE_S = 15.0  # for planned nodes that others use, before any node of the pool will do


class NodeWish(NamedTuple):
    """Where the gangs of a place may be, in Ray's ids of nodes."""

    nodes: tuple[str, ...] = ()  # by rank; empty: any of their pools
    leaves: tuple[str, ...] = ()  # then not these: other places need all that they have


def planned_wishes(variant: Variant, ids: Mapping[str, str]) -> tuple[NodeWish, ...]:
    """Of each place of a gang, by its number; `ids` of live nodes by their names.

    A replica that was planned on a node that is not there may be anywhere. What is no gang has
    place 0 only.
    """
    if variant.shape.num_nodes == 1:
        return (NodeWish(),)
    names = [[part.node for part in replica] for replica in variant.placement]
    planned = [tuple(ids[name] for name in each) if set(each) <= set(ids) else () for each in names]
    return (NodeWish(), *map(NodeWish, planned if any(planned) else ()))


def with_planned(
    wishes: Sequence[NodeWish], planned: Sequence[NodeWish], used: Collection[int]
) -> tuple[NodeWish, ...]:
    """The wishes of a gang that is deployed, and what a later plan adds.

    A place that Serve has, one of `used`, keeps its wish: its gang would have to start anew.
    """
    missing = Counter(wish.nodes for wish in planned[1:] if wish.nodes)
    kept = list(wishes)
    for number, wish in enumerate(kept):
        if number and missing[wish.nodes]:
            missing[wish.nodes] -= 1
        elif number and number not in used:
            kept[number] = NodeWish()
    for nodes in missing.elements():
        free = [n for n, wish in enumerate(kept) if n and n not in used and not wish.nodes]
        if free:
            kept[free[0]] = NodeWish(nodes)
        else:
            kept.append(NodeWish(nodes))
    return tuple(kept)


def reserved(
    variant: Variant, wishes: Sequence[NodeWish], number: int, nodes: Mapping[str, NodeFacts]
) -> tuple[str, ...]:
    """Live nodes that a gang without planned ones must leave to the places beside `number`.

    That is where these have no rank's worth of GPUs to spare, as long as all their nodes live.
    """
    [(resource, each)] = bundle(variant).items()
    others = Counter(
        node
        for other, wish in enumerate(wishes)
        if other != number and set(wish.nodes) <= set(nodes)
        for node in wish.nodes
    )
    room = {node: nodes[node].total.get(resource, 0.0) // each for node in others}
    return tuple(sorted(node for node, ranks in others.items() if room[node] <= ranks))


def shared_out(
    count: int, wishes: Sequence[NodeWish], parts: Mapping[int, Deployed], alive: Collection[str]
) -> dict[int, int]:
    """How many gangs of `count` each place has, by number; `parts` are those that Serve has.

    What runs stays, then come planned nodes that are `alive`, then those that are not, and what is
    left over is beyond the plan. There is at least one place, with 0 gangs if none are asked for.
    """

    def order(number: int) -> tuple[bool, bool, bool, int]:
        wish, part = wishes[number], parts.get(number)
        whole = bool(wish.nodes) and set(wish.nodes) <= set(alive)
        running, wanted = (part.count(*RUNNING), part.target) if part else (0, 0)
        return not running, not whole, not wanted, number

    targets = dict.fromkeys(parts, 0)
    beyond = parts[0].count(*RUNNING) if 0 in parts else 0
    ordered = sorted(range(1, len(wishes)), key=order)
    run = sum(not order(number)[0] for number in ordered)
    chosen = [*ordered[:run], *[0] * beyond, *ordered[run:]][:count]
    for number in [*chosen, *[0] * (count - len(chosen))]:
        targets[number] = targets.get(number, 0) + 1
    return targets or {min(1, len(wishes) - 1): 0}


@dataclass(frozen=True, slots=True)
class Move:
    """A gang that cannot have its nodes goes to the planned ones of place `to`; None: any will do."""

    number: int  # of its own place
    to: int | None
    why: str

    def told(
        self, variant: Variant, wishes: Sequence[NodeWish], nodes: Mapping[str, NodeFacts]
    ) -> str:
        """For the log of events."""
        pools = " and ".join(dict.fromkeys(variant.pools))
        then = f"any of pool {pools} will do, but those that other replicas are planned on"
        if len([wish for wish in wishes if wish.nodes]) == 1:
            then = f"any of pool {pools} will do"
        if self.to is not None:
            there = dict.fromkeys(nodes[node].name for node in wishes[self.to].nodes)
            then = f"{' and '.join(there)} are planned too, and free"
        return f"not on the nodes of the plan, of which {self.why}: {then}"


def next_move(
    variant: Variant,
    wishes: Sequence[NodeWish],
    now: Census,
    *,
    drained: Collection[str],
    now_s: float,
) -> Move | None:
    """The first gang that cannot have the nodes of its place; None: all have them, or may yet.

    `now_s`: epoch seconds.
    """
    parts = now.generations[key_of(variant)].parts
    # Those of an older shape that leave these nodes are known, and waited for.
    patient = sum(each.model == variant.model for each in now.generations.values()) > 1
    for number, wish in enumerate(wishes):
        if wish.nodes and number in parts:
            why = _why_elsewhere(
                wish.nodes, parts[number], now, drained=drained, now_s=now_s, patient=patient
            )
            if why:
                free = _free_place(variant, wishes, now, drained)
                return Move(number, free, why)
    return None


def _why_elsewhere(
    pins: Sequence[str],
    part: Deployed,
    now: Census,
    *,
    drained: Collection[str],
    now_s: float,
    patient: bool,
) -> str:
    coming = [each for each in part.replicas if each.state != STOPPING]
    waiting = [each for each in coming if each.replica in now.placeless]
    if not waiting or part.deleting or not part.target or part.count(*RUNNING):
        return ""
    for pin in pins:
        if pin not in now.nodes:
            return f"node {pin[:8]} is gone"
        if pin in drained:
            return f"{now.nodes[pin].name} is drained"
    if patient or now_s - min(each.started_s for each in waiting) < PATIENCE_S:
        return ""
    return f"{' and '.join(sorted({now.nodes[pin].name for pin in pins}))} are in use"


def _free_place(
    variant: Variant, wishes: Sequence[NodeWish], now: Census, drained: Collection[str]
) -> int | None:
    """A planned one without a gang, whose nodes have nothing else on their GPUs."""
    [(resource, each)] = bundle(variant).items()
    parts = now.generations[key_of(variant)].parts
    for number, wish in enumerate(wishes):
        ranks = Counter(wish.nodes)
        taken = number in parts and (parts[number].target or parts[number].replicas)
        if (
            ranks
            and not taken
            and all(
                node in now.nodes
                and node not in drained
                and now.nodes[node].free.get(resource, 0.0) >= count * each
                for node, count in ranks.items()
            )
        ):
            return number
    return None


def rank_order(variant: Variant, nodes: Sequence[str]) -> tuple[int, ...]:
    """Which bundle each rank takes, so that ranks stand where the plan has them.

    `nodes` are those of the bundles, as plans name them; the first is the leader's, which is rank 0.
    Of the planned replicas the one counts that has most of these nodes, the leader's before all.
    """
    here = Counter(nodes)

    def alike(names: Sequence[str]) -> tuple[bool, int]:
        return names[0] == nodes[0], (Counter(names) & here).total()

    planned = [[part.node for part in replica] for replica in variant.placement]
    wanted = max((names for names in planned if len(names) == len(nodes)), key=alike, default=nodes)
    pools, left = variant.rank_pools, set(range(1, len(nodes)))
    order = {0: 0}
    for exact in (True, False):
        for rank in range(1, len(nodes)):
            fitting = [
                bundle
                for bundle in sorted(left)
                if pools[bundle] == pools[rank] and (nodes[bundle] == wanted[rank] or not exact)
            ]
            if rank not in order and fitting:
                order[rank] = fitting[0]
                left.remove(fitting[0])
    return tuple(order[rank] for rank in range(len(nodes)))
