"""FleetSpec: the YAML an operator writes to say what is to be served."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from placement.catalogue import Precision
from placement.spec import Spec


class TokenLengths(Spec):
    """Distribution of a request's token counts."""

    mean: PositiveFloat
    p95: PositiveFloat | None = None


class Demand(Spec):
    """Load that a model must carry."""

    requests_per_s: NonNegativeFloat
    input_tokens: TokenLengths = TokenLengths(mean=512)
    output_tokens: TokenLengths = TokenLengths(mean=128)


class Objective(Spec):
    """Service level: percentiles that hold under the demand."""

    ttft_p95_s: PositiveFloat | None = Field(None, description="Time to first token, seconds.")
    tpot_p95_ms: PositiveFloat | None = Field(None, description="Time per output token, ms.")


class ReplicaBounds(Spec):
    """How many replicas may run. `min: 0` lets the model scale to zero."""

    min: NonNegativeInt = 1
    max: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        return self


class ScalingPolicy(Spec):
    """How the replica count follows the load between `replicas.min` and `replicas.max`."""

    target_utilization: PositiveFloat = Field(
        0.7, le=1.0, description="Share of a replica's request slots that should be busy."
    )
    scale_up_delay_s: NonNegativeFloat = Field(1.0, description="Load must be high for this long.")
    scale_down_delay_s: NonNegativeFloat = Field(
        30.0, description="Load must be low for this long."
    )
    scale_to_zero_delay_s: NonNegativeFloat = Field(300.0, description="Idle for this long: to 0.")


class FleetModel(Spec):
    """One model that the fleet serves."""

    name: str = Field(
        min_length=1,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$",
        description="What clients send as `model`.",
    )
    aliases: tuple[str, ...] = ()
    model: str = Field(description="Catalogue name, Hugging Face repo id or path.")
    precision: Literal["any"] | tuple[Precision, ...] = "any"
    engine: Literal["vllm", "sim"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = Field(
        None, description="Tokens; None: the model's context."
    )
    max_num_seqs: PositiveInt | None = Field(None, description="Requests an engine runs at once.")
    tensor_parallel_size: PositiveInt | None = Field(None, description="None: the planner chooses.")
    expert_parallel: bool | None = Field(None, description="None: the planner chooses.")
    demand: Demand | None = None
    slo: Objective = Objective()
    replicas: ReplicaBounds = ReplicaBounds()
    pools: tuple[str, ...] | None = Field(None, description="Only on these pools.")
    scaling: ScalingPolicy = ScalingPolicy()
    simulate_gpu: str | None = Field(
        None, description="engine: sim only: the GPU type whose speed is simulated."
    )
    engine_args: tuple[str, ...] = Field((), description="More flags for the engine.")


class GatewaySpec(Spec):
    """The front door."""

    http_port: NonNegativeInt = Field(8000, le=65535)
    grpc_port: NonNegativeInt = Field(8001, le=65535)
    host: str = "127.0.0.1"
    auth: Literal["none"] = "none"


class FleetSpec(Spec):
    """Everything that one `bora deploy` puts on a cluster."""

    fleet: str = Field(min_length=1, pattern=r"^[a-z0-9][a-z0-9-]*$")
    models: tuple[FleetModel, ...] = Field(min_length=1)
    objective: Literal["cost", "throughput", "headroom"] = "cost"
    gateway: GatewaySpec = GatewaySpec()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        seen: set[str] = set()
        for model in self.models:
            for name in (model.name, *model.aliases):
                if name in seen:
                    raise ValueError(f"two models of the fleet answer to the name {name!r}")
                seen.add(name)
        return self
