"""Easing: how a fleet that does not fit could ask for less, or an inventory offer more, as a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from placement.fleet import FleetModel, FleetSpec, Objective
from placement.inventory import Inventory
from placement.spec import Spec


class Easing(Spec):
    """What would change for one model; of several, all together."""

    max_replicas: int | None = Field(default=None, description="Its `replicas.max`.")
    slo: Objective | None = Field(default=None, description="Its service level.")
    max_model_len: int | None = Field(default=None, description="Tokens.")
    any_precision: bool = Field(default=False, description="`precision: any`.")
    any_tensor_size: bool = Field(default=False, description="No `tensor_parallel_size`.")
    more_nodes: Mapping[str, int] = Field(default_factory=dict, description="By pool.")
    max_spot_share: float | None = Field(default=None, description="Of the fleet.")
    forgo_node_loss: bool = Field(default=False, description="`carry_node_loss: false`.")


def eased(
    fleet: FleetSpec, inventory: Inventory, easings: Sequence[tuple[str, Easing]]
) -> tuple[FleetSpec, Inventory]:
    """The fleet and the inventory after all of these, each for the model of that name."""
    by_name = dict(easings)
    more: dict[str, int] = {}
    for _, easing in easings:
        for pool, nodes in easing.more_nodes.items():
            more[pool] = more.get(pool, 0) + nodes
    shares = [each.max_spot_share for each in by_name.values() if each.max_spot_share is not None]
    forgo = any(easing.forgo_node_loss for easing in by_name.values())
    models = tuple(
        _eased_model(wish, by_name[wish.name]) if wish.name in by_name else wish
        for wish in fleet.models
    )
    pools = tuple(pool.with_more_nodes(more.get(pool.name, 0)) for pool in inventory.pools)
    changes = {
        "models": models,
        "max_spot_share": max([fleet.max_spot_share, *shares]),
        "carry_node_loss": fleet.carry_node_loss and not forgo,
    }
    return fleet.model_copy(update=changes), inventory.model_copy(update={"pools": pools})


def _eased_model(wish: FleetModel, easing: Easing) -> FleetModel:
    changes: dict[str, object] = {}
    if easing.max_replicas is not None:
        changes["replicas"] = wish.replicas.model_copy(update={"max": easing.max_replicas})
    if easing.slo is not None:
        changes["slo"] = easing.slo
    if easing.max_model_len is not None:
        changes["max_model_len"] = easing.max_model_len
    if easing.any_precision:
        changes["precision"] = "any"
    if easing.any_tensor_size:
        changes["tensor_parallel_size"] = None
    return wish.model_copy(update=changes)


def differences(
    before: tuple[FleetSpec, Inventory], after: tuple[FleetSpec, Inventory]
) -> Iterator[str]:
    """What was eased, in words."""
    for here, there in zip(before[0].models, after[0].models, strict=True):
        if here.replicas.max != there.replicas.max:
            yield f"replicas.max {there.replicas.max} of {here.name}"
        if here.slo != there.slo:
            level = there.slo.model_dump(exclude_none=True)
            told = " and ".join(f"{name} {value:g}" for name, value in level.items())
            yield f"{told} of {here.name}"
        if here.max_model_len != there.max_model_len:
            yield f"max_model_len {there.max_model_len} of {here.name}"
        if here.precision != there.precision:
            yield f"precision any of {here.name}"
        if here.tensor_parallel_size != there.tensor_parallel_size:
            yield f"no tensor_parallel_size of {here.name}"
    for pool, larger in zip(before[1].pools, after[1].pools, strict=True):
        yield from added_nodes(
            pool.name, f"{pool.gpus_per_node} x {pool.gpu}", larger.nodes - pool.nodes
        )
    if before[0].max_spot_share != after[0].max_spot_share:
        yield f"max_spot_share {after[0].max_spot_share:g}"
    if before[0].carry_node_loss != after[0].carry_node_loss:
        yield "carry_node_loss false"


def added_nodes(pool: str, form: str, nodes: int) -> Iterator[str]:
    """`2 more nodes (8 x H100-SXM) in pool h100`; nothing of none."""
    if nodes:
        yield f"{nodes} more {'node' if nodes == 1 else 'nodes'} ({form}) in pool {pool}"
