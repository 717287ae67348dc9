"""Plans for tests: a few wishes on a few pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from placement.catalogue import Catalogue, ModelSpec
from placement.fleet import FleetModel
from placement.inventory import Pool
from placement.plan import Plan, Variant
from placement.planner import make_plan
from tests.placement.builders import (
    CATALOGUE,
    a_catalogue,
    a_cpu_pool,
    a_fleet,
    a_model,
    a_wish,
    an_inventory,
)


def plan_for(
    *wishes: FleetModel,
    pools: Sequence[Pool] = (),
    catalogue: Catalogue = CATALOGUE,
    **changes: Any,
) -> Plan:
    return make_plan(a_fleet(*wishes, **changes), an_inventory(*pools), catalogue)


def plan_on_cpu(
    wish: FleetModel | None = None, model: ModelSpec | None = None, **pool: Any
) -> Plan:
    wish = wish or a_wish()
    return plan_for(wish, pools=[a_cpu_pool(**pool)], catalogue=a_catalogue(model or a_model()))


def the_only(plan: Plan) -> Variant:
    assert plan.status == "optimal", plan.unmet
    (variant,) = plan.variants
    return variant
