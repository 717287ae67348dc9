"""A next version gets its share under the model's own name."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from placement.canary import apart, merged, with_canaries
from placement.errors import ConfigError
from placement.fleet import Canary, FleetSpec, ReplicaBounds
from placement.planner import make_plan
from placement.routing_policy import RoutingPolicy
from tests.placement.builders import CATALOGUE, a_cpu_pool, a_fleet, a_wish, an_inventory

CANARY = Canary(weight=0.2, engine_args=("--seed=7",))


def a_fleet_with_a_canary() -> FleetSpec:
    chat = a_wish(
        "chat",
        "nano-mixtral",
        aliases=("c",),
        canary=CANARY,
        replicas=ReplicaBounds(min=2, max=2),
        max_model_len=2048,
    )
    return a_fleet(chat, a_wish("other", "nano-mixtral", max_model_len=2048))


def test_a_canary_is_planned_beside_its_model_and_served_under_its_name():
    fleet = a_fleet_with_a_canary()

    plan = merged(make_plan(with_canaries(fleet), an_inventory(a_cpu_pool()), CATALOGUE), fleet)

    stable, canary, other = plan.variants
    assert (stable.model, canary.model, other.model) == ("chat", "chat", "other")
    assert (stable.replicas, canary.replicas) == (2, 1)
    assert (stable.aliases, canary.aliases) == (("c",), ("c",))
    assert "--seed=7" in canary.shape.engine_args
    assert "--seed=7" not in stable.shape.engine_args
    assert stable.routing.weights == {stable.variant: 0.8, canary.variant: 0.2}
    assert canary.routing == stable.routing
    assert other.routing.weights == {}


def test_a_fleet_without_canaries_is_planned_as_it_is():
    fleet = a_fleet(a_wish("chat", "nano-mixtral", max_model_len=2048))
    plan = make_plan(fleet, an_inventory(a_cpu_pool()), CATALOGUE)

    assert with_canaries(fleet) == fleet
    assert merged(plan, fleet) == plan


@pytest.mark.parametrize("name", ["chat", "lab/chat"])
def test_what_runs_beside_a_canary_stays_where_it_is(name):
    bounds = ReplicaBounds(min=2, max=2)
    chat = a_wish(name, "nano-mixtral", canary=CANARY, replicas=bounds, max_model_len=2048)
    fleet, pools = a_fleet(chat), an_inventory(a_cpu_pool())
    first = make_plan(with_canaries(fleet), pools, CATALOGUE)
    running = merged(first, fleet)

    assert [each.model for each in apart(running).variants] == [
        each.model for each in first.variants
    ]
    again = make_plan(with_canaries(fleet), pools, CATALOGUE, running=apart(running))
    assert [each.placement for each in again.variants] == [
        each.placement for each in first.variants
    ]


def test_weights_and_a_canary_contradict_each_other():
    routing = RoutingPolicy(weights={"chat@cpu-tp1": 1.0})
    fleet = a_fleet(a_wish("chat", "nano-mixtral", canary=CANARY, routing=routing))

    with pytest.raises(ConfigError, match=r"canary.weight and routing.weights"):
        with_canaries(fleet)


def test_a_model_with_the_canarys_name_is_refused():
    fleet = a_fleet(
        a_wish("chat", "nano-mixtral", canary=CANARY), a_wish("chat.canary", "nano-mixtral")
    )

    with pytest.raises(ConfigError, match=r"chat\.canary"):
        with_canaries(fleet)


def test_a_canary_that_differs_in_nothing_is_refused():
    with pytest.raises(ValidationError, match="give what is new"):
        Canary(weight=0.5)
