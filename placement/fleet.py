"""FleetSpec: the YAML an operator writes to say what is to be served."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from placement.demand import Demand, Objective, TokenLengths
from placement.errors import nearest
from placement.fleet_model import Canary, FleetModel
from placement.model_cache import ModelCacheSpec
from placement.replica_counts import ReplicaBounds, ScalingPolicy
from placement.spec import Spec, mistake

__all__ = [
    "Canary", "Demand", "FleetModel", "FleetSpec", "GatewaySpec", "Objective", "ReplicaBounds",
    "ScalingPolicy", "TokenLengths",
]  # fmt: skip


class GatewaySpec(Spec):
    """The front door."""

    http_port: NonNegativeInt = Field(default=8000, le=65535, description="0: any free port.")
    grpc_port: NonNegativeInt = Field(default=8001, le=65535, description="0: any free port.")
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on. Beyond loopback, set `auth: keys`.",
    )
    auth: Literal["none", "keys"] = Field(
        default="none",
        description="Who may ask. `none`: anybody; `keys`: who has a key, see `bora keys`.",
    )
    replicas: PositiveInt = Field(
        default=1, description="Gateways, each on a host of its own, all on the same ports."
    )

    @model_validator(mode="after")
    def _a_port_for_each(self) -> Self:
        if self.http_port == self.grpc_port != 0:
            raise ValueError(
                f"http_port and grpc_port are both {self.http_port}; each needs a port of its own"
            )
        return self


class FleetSpec(Spec):
    """Everything that one `bora deploy` puts on a cluster."""

    fleet: str = Field(
        min_length=1, pattern=r"^[a-z0-9][a-z0-9-]*$", description="Its name: a-z, 0-9 and dashes."
    )
    models: tuple[FleetModel, ...] = Field(min_length=1, description="At least one.")
    objective: Literal["cost", "throughput", "headroom"] = Field(
        default="cost",
        description="Among plans that meet the demand: cheapest; most requests/s of all models "
        "together; or most to spare, for the model that has least.",
    )
    spare_nodes: NonNegativeInt = Field(
        default=0,
        description="Nodes of each pool that stay empty, so that the replicas of a lost node can "
        "start again: 1 survives the loss of one node of each pool.",
    )
    carry_node_loss: bool = Field(
        default=False,
        description="Every model carries its demand, within its service level, when any one node "
        "is lost, before anything starts again (N+1); a model without a demand has two replicas.",
    )
    max_spot_share: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of a model's demand that may depend on pools marked `spot`.",
    )
    robust: Literal["off", "prefer", "require"] = Field(
        default="prefer",
        description="Whether the plan must hold with engines 15 % slower and 5 % less memory: "
        "`prefer` takes such a plan when it is as good as the best.",
    )
    horizon_s: PositiveFloat = Field(
        default=3600.0,
        description="How long a plan is expected to last: moving a running replica must pay for "
        "itself within it.",
    )
    model_cache: ModelCacheSpec = Field(
        default=ModelCacheSpec(), description="Downloaded checkpoints on the nodes."
    )
    gateway: GatewaySpec = Field(default=GatewaySpec(), description="The front door.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        seen: dict[str, str] = {}
        for index, model in enumerate(self.models):
            names: list[tuple[str, tuple[str | int, ...]]] = [(model.name, ("name",))]
            names += [(name, ("aliases", at)) for at, name in enumerate(model.aliases)]
            names += [(name, ("adapters", name)) for name in model.adapters]
            for name, at in names:
                if name in seen:
                    raise mistake(
                        f"two models of the fleet answer to the name {name!r}, this one and "
                        f"{seen[name]}; give one of them another",
                        *("models", index, *at),
                    )
                seen[name] = f"models[{index}]"
        return self

    @model_validator(mode="after")
    def _fallbacks_exist(self) -> Self:
        names = [name for model in self.models for name in (model.name, *model.aliases)]
        for index, model in enumerate(self.models):
            for at, name in enumerate(model.fallback):
                if name not in names or name in (model.name, *model.aliases):
                    hint = nearest(name, [each for each in names if each != model.name])
                    raise mistake(
                        f"{model.name}: fallback {name!r} is no other model of the fleet{hint}",
                        *("models", index, "fallback", at),
                    )
        return self
