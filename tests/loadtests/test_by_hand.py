"""Rules of thumb, beside which the planner is measured, on fleets that need more than they know."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.by_hand import first_fit, own_nodes, own_pools
from placement.catalogue import load_catalogue
from placement.fleet import FleetSpec
from placement.inventory import Inventory
from placement.spec import load_yaml

FLEETS = Path(__file__).resolve().parent.parent.parent / "configs" / "fleets"


@pytest.mark.parametrize("name", ["small-boxes", "large-3-h100"])
def test_rules_of_thumb_leave_a_model_short_that_no_node_holds(name: str):
    fleet = load_yaml(FLEETS / f"{name}.yaml", FleetSpec)
    inventory = load_yaml(FLEETS / f"{name}.inventory.yaml", Inventory)
    catalogue = load_catalogue()

    assert first_fit(fleet, inventory, catalogue).short
    assert own_nodes(fleet, inventory, catalogue) is None
    assert own_pools(fleet, inventory, catalogue) is None
