"""The smallest changes that let a fleet fit which does not: found by planning for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from placement.catalogue import Catalogue
from placement.explanation import WayOut
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.milp import Limits
from placement.plan import Plan
from placement.planner import make_plan

MOST_NODES = 64  # that are tried to be added to a pool
_LIMITS = Limits(time_s=5.0)
_EASIER = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def ways_out(
    fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue, plan: Plan
) -> tuple[WayOut, ...]:
    """Each the least of its kind that suffices alone, cheapest plan first.

    Kinds: nodes added to one pool; replicas.max, service level or demand of the models that go
    short.
    """
    if not plan.unmet:
        return ()
    found = [
        *_more_nodes(fleet, inventory, catalogue),
        *_easier_models(fleet, inventory, catalogue, {entry.model for entry in plan.unmet}),
    ]
    return tuple(sorted(found, key=lambda way: (way.cost_per_hour, way.change)))


def _cost(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> float | None:
    plan = make_plan(
        fleet.model_copy(update={"robust": "off"}) if fleet.robust == "prefer" else fleet,
        inventory,
        catalogue,
        limits=_LIMITS,
    )
    return None if plan.unmet else plan.cost_per_hour


def _more_nodes(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> Iterator[WayOut]:
    for pool in inventory.pools:

        def cost(nodes: int, pool: Pool = pool) -> float | None:
            larger = pool.with_more_nodes(nodes)
            pools = tuple(larger if each.name == pool.name else each for each in inventory.pools)
            return _cost(fleet, inventory.model_copy(update={"pools": pools}), catalogue)

        nodes = _least(cost, MOST_NODES)
        if nodes is not None:
            form = f"{pool.gpus_per_node} x {pool.gpu}"
            noun = "node" if nodes == 1 else "nodes"
            price = cost(nodes)
            yield WayOut(
                change=f"{nodes} more {noun} ({form}) in pool {pool.name}",
                cost_per_hour=price if price is not None else 0.0,
            )


def _least(works: Callable[[int], float | None], most: int) -> int | None:
    """The least number from 1 to `most` that works; None: `most` does not."""
    if works(most) is None:
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if works(middle) is None:
            low = middle + 1
        else:
            high = middle
    return low


def _easier_models(
    fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue, short: set[str]
) -> Iterator[WayOut]:
    def cost(change: Callable[[FleetModel], FleetModel]) -> float | None:
        models = tuple(change(wish) if wish.name in short else wish for wish in fleet.models)
        return _cost(fleet.model_copy(update={"models": models}), inventory, catalogue)

    names = ", ".join(sorted(short))
    tries: list[tuple[str, Callable[[FleetModel, float], FleetModel]]] = [
        ("{factor:g} times the replicas.max of " + names, _more_replicas),
        ("a service level {factor:g} times as slow for " + names, _slower),
        ("{share:.0f} % of the demand of " + names, _less_demand),
    ]
    for words, change in tries:
        for factor in _EASIER:
            price = cost(lambda wish, change=change, factor=factor: change(wish, factor))  # type: ignore[misc]
            if price is not None:
                told = words.format(factor=factor, share=100 / factor)
                yield WayOut(change=told, cost_per_hour=price)
                break


def _more_replicas(wish: FleetModel, factor: float) -> FleetModel:
    bounds = wish.replicas.model_copy(update={"max": int(wish.replicas.max * factor + 0.999)})
    return wish.model_copy(update={"replicas": bounds})


def _slower(wish: FleetModel, factor: float) -> FleetModel:
    given = {name: value for name, value in wish.slo.model_dump().items() if value is not None}
    levels = {name: value * factor for name, value in given.items()}
    return wish.model_copy(update={"slo": wish.slo.model_copy(update=levels)})


def _less_demand(wish: FleetModel, factor: float) -> FleetModel:
    if wish.demand is None:
        return wish
    rate = wish.demand.requests_per_s / factor
    demand = wish.demand.model_copy(update={"requests_per_s": rate})
    return wish.model_copy(update={"demand": demand})
