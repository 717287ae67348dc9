"""What the loss of any one node would cost: told with a plan, and asked for by `carry_node_loss`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.inventory import Inventory
from placement.loading import variant_load_s
from placement.plan import NodeLoss, Variant
from placement.roles import together
from placement.routing_policy import Role

_ENOUGH = 1 - 1e-6  # of a demand
_Rate = tuple[Role, float]  # of a replica, requests/s


@dataclass(frozen=True, slots=True)
class Lost:
    """What one node takes with it of one model."""

    node: str
    model: str
    left: float  # requests/s that its other replicas carry
    taken: float  # requests/s that those on the node carried
    wanted: float  # requests/s: its demand; without one, what its smallest replica carries

    @property
    def share(self) -> float:
        """Of what is wanted."""
        return self.left / self.wanted


def losses(variants: Sequence[Variant], demands: Mapping[str, float]) -> list[Lost]:
    """For each model the node whose loss would leave least; models of which nothing runs have none.

    Where prompts and answers have replicas of their own, either side's loss counts. `demands`: requests/s by model; a model without a demand should keep one replica.
    """
    there: defaultdict[str, list[_Rate]] = defaultdict(list)
    smallest: dict[str, float] = {}
    on_nodes: defaultdict[str, defaultdict[str, list[_Rate]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for variant in variants:
        rate, role = variant.capacity_requests_per_s, variant.role
        for replica in variant.placement:
            there[variant.model].append((role, rate))
            smallest[variant.model] = min(rate, smallest.get(variant.model, rate))
            for node in dict.fromkeys(entry.node for entry in replica):
                on_nodes[variant.model][node].append((role, rate))
    found = []
    for model in sorted(on_nodes):
        wanted = demands.get(model) or smallest[model]
        all_of_it = together(there[model])
        most, node = max(
            (all_of_it - together((*there[model], *((role, -rate) for role, rate in gone))), name)
            for name, gone in on_nodes[model].items()
        )
        left = max(0.0, all_of_it - most)
        found.append(Lost(node, model, left, most, wanted))
    return found


def node_loss(
    variants: Sequence[Variant], inventory: Inventory, demands: Mapping[str, float]
) -> NodeLoss | None:
    """Whether every model carries its demand without any one node; None: there is but one node."""
    found = losses(variants, demands)
    if not found or sum(pool.nodes for pool in inventory.pools) < 2:
        return None
    worst = min(found, key=lambda lost: (lost.share, lost.model))
    restarts = _restarts(variants, inventory)
    return NodeLoss(
        carried=worst.share >= _ENOUGH,
        restarts=all(seconds is not None for seconds in restarts.values()),
        node=worst.node,
        model=worst.model,
        share=worst.share,
        restart_s=restarts[worst.node],
    )


def _restarts(variants: Sequence[Variant], inventory: Inventory) -> dict[str, float | None]:
    """For each node in use, seconds until its replicas run again on free GPUs of its pool.

    None: there is no room. Larger replicas first, each on the fullest node that has room.
    """
    pool_of = {node: pool.name for pool in inventory.pools for node in pool.names()}
    free = {node: pool.gpus_per_node for pool in inventory.pools for node in pool.names()}
    on_node: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for variant in variants:
        seconds = variant_load_s(variant) if variant.placement else 0.0
        for replica in variant.placement:
            gpus: Counter[str] = Counter()
            for entry in replica:
                gpus[entry.node] += len(entry.gpus)
            for node, count in gpus.items():
                free[node] -= count
                on_node[node].append((count, seconds))
    by_pool: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for node, count in free.items():
        by_pool[pool_of[node]][count] += 1
    return {
        node: max(seconds for _, seconds in lost)
        if _have_room(lost, by_pool[pool_of[node]], free[node])
        else None
        for node, lost in on_node.items()
    }


def _have_room(lost: Sequence[tuple[int, float]], free: Counter[int], own: int) -> bool:
    """Whether replicas of these sizes fit on a pool's nodes, counted by free GPUs, without one."""
    left = free.copy()
    left[own] -= 1
    for size, _ in sorted(lost, reverse=True):
        fitting = [gpus for gpus, nodes in left.items() if nodes > 0 and gpus >= size]
        if not fitting:
            return False
        left[min(fitting)] -= 1
        left[min(fitting) - size] += 1
    return True
