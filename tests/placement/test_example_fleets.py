"""The fleets in configs/fleets tell a story each; this is what bora answers."""

from __future__ import annotations

import pytest

from placement.catalogue import CONFIGS
from placement.fleet import FleetSpec
from placement.fleet_file import load_fleet
from placement.inventory import Inventory
from placement.plan import Plan
from placement.planner import make_plan
from placement.spec import load_yaml
from tests.placement.builders import CATALOGUE

EXAMPLES = sorted(
    path.name.removesuffix(".inventory.yaml")
    for path in (CONFIGS / "fleets").glob("*.inventory.yaml")
)


def example(name: str) -> tuple[FleetSpec, Inventory]:
    folder = CONFIGS / "fleets"
    return (
        load_fleet(folder / f"{name}.yaml"),
        load_yaml(folder / f"{name}.inventory.yaml", Inventory),
    )


def plan_of(name: str) -> Plan:
    return make_plan(*example(name), CATALOGUE)


def told(plan: Plan) -> list[str]:
    return [
        f"{v.variant}: {v.replicas} x {v.shape.precision} on {v.gpus_per_replica} x {v.gpu}"
        for v in plan.variants
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_fits_and_is_solved_to_the_end(name: str) -> None:
    plan = plan_of(name)

    assert plan.unmet == ()
    assert plan.status == "optimal"
    assert all(variant.predicted.utilization <= 1 + 1e-6 for variant in plan.variants)


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("one-4090", ["small@desk-tp1: 1 x nvfp4 on 1 x RTX-4090"]),
        (
            "four-4090",
            [
                "chat@box-tp1: 1 x nvfp4 on 1 x RTX-4090",
                "drafts@box-tp1: 1 x bf16 on 1 x RTX-4090",
            ],
        ),
        (
            "from-trace",
            [
                "chat@a100-tp1: 1 x bf16 on 1 x A100-80-SXM",
                "code@rtx4090-tp1: 1 x bf16 on 1 x RTX-4090",
            ],
        ),
        ("large-3-a100", ["large@a100-tp8-ep: 1 x nvfp4 on 8 x A100-80-SXM"]),
        (
            "prefill-decode",
            [
                "documents@a100-tp8-decode: 1 x bf16 on 8 x A100-80-SXM",
                "documents@h100-tp4-prefill: 2 x bf16 on 4 x H100-SXM",
            ],
        ),
        ("large-3-h200", ["large@h200-tp8-ep: 1 x fp8 on 8 x H200-SXM"]),
    ],
)
def test_an_example_is_planned_as_its_comment_says(name: str, variants: list[str]) -> None:
    assert told(plan_of(name)) == variants


def test_the_family_shares_three_kinds_of_gpus() -> None:
    plan = plan_of("family")
    pools = {v.model: {w.pool for w in plan.variants if w.model == v.model} for v in plan.variants}

    assert "large@a100-tp8-ep: 1 x nvfp4 on 8 x A100-80-SXM" in told(plan)
    assert pools["ministral"] == {"rtx4090"}
    assert pools["mixtral"] == {"a100"}
    assert len(pools["small"]) == 2  # neither pool alone carries it as cheaply


def test_reading_and_writing_on_unlike_gpus_saves_a_quarter() -> None:
    fleet, inventory = example("prefill-decode")
    whole = tuple(wish.model_copy(update={"disaggregate": "never"}) for wish in fleet.models)

    apart = plan_of("prefill-decode").cost_per_hour
    together = make_plan(
        fleet.model_copy(update={"models": whole}), inventory, CATALOGUE
    ).cost_per_hour

    assert apart < 0.75 * together
