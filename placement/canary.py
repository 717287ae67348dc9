"""Canary: a model's next version gets a share of its requests, beside the present one.

To the planner a canary is a model of its own; afterwards its variants are the model's, with weights
that split the requests.
"""

from __future__ import annotations

import re

from placement.errors import ConfigError
from placement.fleet import FleetModel, FleetSpec, ReplicaBounds
from placement.plan import Plan, Variant

CANARY = ".canary"  # what is added to the name of its model
# In a variant's name, with the checksum of models whose names are alike.
_OF_CANARY = re.compile(r"\.canary(-[0-9a-f]{8})?@")


def with_canaries(fleet: FleetSpec) -> FleetSpec:
    """The fleet as the planner takes it: every canary beside its model, as `NAME.canary`.

    Raises:
        ConfigError: a model has that name already, or `routing.weights` beside its canary.
    """
    models: list[FleetModel] = []
    for model in fleet.models:
        models.append(model.model_copy(update={"canary": None}))
        if model.canary is not None:
            models.append(_canary(model))
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is the name of a canary; give the model another one")
    return fleet.model_copy(update={"models": tuple(models)})


def _canary(model: FleetModel) -> FleetModel:
    assert model.canary is not None  # noqa: S101 - asked before
    if model.routing.weights:
        raise ConfigError(
            f"{model.name}: canary.weight and routing.weights both split the requests; "
            f"leave one of them out"
        )
    canary = model.canary
    changes = canary.model_dump(exclude={"weight", "replicas"}, exclude_none=True)
    own = {
        "name": model.name + CANARY,
        "aliases": (),
        "fallback": (),
        "demand": None,
        "canary": None,
        "replicas": ReplicaBounds(min=canary.replicas, max=canary.replicas),
    }
    return model.model_copy(update={**changes, **own})


def merged(plan: Plan, fleet: FleetSpec) -> Plan:
    """`plan`, made for `with_canaries(fleet)`, with every canary's variants under its model."""
    canaries = {
        model.name: model.canary.weight for model in fleet.models if model.canary is not None
    }
    variants: list[Variant] = []
    for name in dict.fromkeys(_served(variant, canaries) for variant in plan.variants):
        own = [each for each in plan.variants if _served(each, canaries) == name]
        variants += _under_one_name(name, own, canaries[name]) if name in canaries else own
    return plan.model_copy(update={"variants": tuple(variants)})


def apart(plan: Plan) -> Plan:
    """A plan that was `merged`, with canaries as models of their own: as the planner knows them."""
    return plan.model_copy(
        update={
            "variants": tuple(
                variant.model_copy(update={"model": variant.model + CANARY})
                if _OF_CANARY.search(variant.variant) and not variant.model.endswith(CANARY)
                else variant
                for variant in plan.variants
            )
        }
    )


def _served(variant: Variant, canaries: dict[str, float]) -> str:
    """What clients call the model of which it is a variant."""
    name = variant.model.removesuffix(CANARY)
    return name if name in canaries else variant.model


def _under_one_name(name: str, variants: list[Variant], share: float) -> list[Variant]:
    """The present version first; its variants share what the canary leaves, by capacity."""
    stable = [variant for variant in variants if variant.model == name]
    canary = [variant for variant in variants if variant.model != name]
    weights = _spread(stable, 1.0 - share) | _spread(canary, share)
    return [
        variant.model_copy(
            update={
                "model": name,
                "aliases": stable[0].aliases if stable else (),
                "fallback": stable[0].fallback if stable else (),
                "routing": variant.routing.model_copy(update={"weights": weights}),
            }
        )
        for variant in (*stable, *canary)
    ]


def _spread(variants: list[Variant], share: float) -> dict[str, float]:
    capacities = [each.replicas * each.capacity_requests_per_s for each in variants]
    total = sum(capacities)
    return {
        each.variant: round(share * (capacity / total if total else 1 / len(variants)), 6)
        for each, capacity in zip(variants, capacities, strict=True)
    }
