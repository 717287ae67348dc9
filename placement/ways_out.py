"""The smallest changes that let a fleet fit which does not: found by planning for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from placement.catalogue import Catalogue
from placement.easing import Easing, added_nodes, differences, eased
from placement.explanation import WayOut
from placement.fleet import FleetModel, FleetSpec, Objective
from placement.inventory import Inventory, Pool
from placement.milp import Limits
from placement.plan import Plan
from placement.planner import make_plan

MOST_NODES = 64  # that are tried to be added to a pool
_LIMITS = Limits(time_s=5.0)
_ROUNDS = 4
_HALVINGS = 3  # between two of those
_EASIER = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def ways_out(
    fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue, plan: Plan
) -> tuple[WayOut, ...]:
    """Each the least of its kind that suffices alone, cheapest plan first.

    Kinds: nodes added to one pool; replicas.max, service level or demand of the models that go
    short; and for each model what it lacks, all together.
    """
    if not plan.unmet:
        return ()
    found = [
        *_more_nodes(fleet, inventory, catalogue),
        *_easier_models(fleet, inventory, catalogue, {entry.model for entry in plan.unmet}),
        *_what_each_lacks(fleet, inventory, catalogue, plan),
    ]
    found = [way for index, way in enumerate(found) if way not in found[:index]]
    return tuple(sorted(found, key=lambda way: (way.cost_per_hour, way.change)))


def _plan(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> Plan:
    lenient = fleet.model_copy(update={"robust": "off"}) if fleet.robust == "prefer" else fleet
    return make_plan(lenient, inventory, catalogue, limits=_LIMITS)


def _cost(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> float | None:
    plan = _plan(fleet, inventory, catalogue)
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
            price = cost(nodes)
            for change in added_nodes(pool.name, form, nodes):
                yield WayOut(change=change, cost_per_hour=price if price is not None else 0.0)


def _what_each_lacks(
    fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue, plan: Plan
) -> Iterator[WayOut]:
    """All that the plan says of its models, done; and of the plan then, should it not be enough."""
    now = fleet, inventory
    for _ in range(_ROUNDS):
        if any(entry.easing == Easing() for entry in plan.unmet):
            return
        now = eased(*now, [(entry.model, entry.easing) for entry in plan.unmet])
        plan = _plan(*now, catalogue)
        if not plan.unmet:
            change = ", ".join(differences((fleet, inventory), now))
            yield WayOut(change=change, cost_per_hour=plan.cost_per_hour)
            return


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
    wishes = [wish for wish in fleet.models if wish.name in short]
    tries: list[tuple[str, Callable[[FleetModel, float], FleetModel]]] = [
        ("{factor:g} times the replicas.max of " + names, _more_replicas)
    ]
    if any(wish.slo != Objective() for wish in wishes):
        tries.append(("a service level {factor:g} times as slow for " + names, _slower))
    if any(wish.demand is not None for wish in wishes):
        tries.append(("{share} % of the demand of " + names, _less_demand))
    for words, change in tries:
        found = _least_factor(
            lambda factor, change=change: cost(lambda wish: change(wish, factor))  # type: ignore[misc]
        )
        if found is not None:
            factor, price = found
            told = words.format(factor=factor, share=math.floor(100 / factor))
            yield WayOut(change=told, cost_per_hour=price)


def _least_factor(cost: Callable[[float], float | None]) -> tuple[float, float] | None:
    """The least factor that works, to some percent, and the cost then; None: not even the largest."""
    below = 1.0
    for factor in _EASIER:
        price = cost(factor)
        if price is not None:
            break
        below = factor
    else:
        return None
    for _ in range(_HALVINGS):
        middle = math.ceil(100 * math.sqrt(below * factor)) / 100
        if middle >= factor:
            break
        less = cost(middle)
        if less is None:
            below = middle
        else:
            factor, price = middle, less
    return factor, price


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
