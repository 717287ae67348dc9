"""FleetSpec: the YAML an operator writes to say what is to be served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from placement.catalogue import Precision
from placement.errors import nearest
from placement.model_cache import ModelCacheSpec
from placement.routing_policy import RoutingPolicy
from placement.serving_features import ExpertBalance, LoraLimits
from placement.spec import Spec, mistake


class TokenLengths(Spec):
    """Distribution of a request's token counts."""

    mean: PositiveFloat = Field(description="Tokens.")
    p95: PositiveFloat | None = Field(default=None, description="Tokens; None: the mean.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.p95 is not None and self.p95 < self.mean:
            why = f"{self.p95:g} tokens are fewer than the mean of {self.mean:g}"
            raise mistake(f"{why}; give more, or leave p95 out", "p95")
        return self


class Demand(Spec):
    """Load that a model must carry."""

    requests_per_s: NonNegativeFloat = Field(description="Of all clients together.")
    input_tokens: TokenLengths = Field(
        default=TokenLengths(mean=512), description="Prompt lengths; default mean 512."
    )
    output_tokens: TokenLengths = Field(
        default=TokenLengths(mean=128), description="Answer lengths; default mean 128."
    )
    prefix_hit: NonNegativeFloat = Field(
        default=0.0, le=1.0, description="Share of prompt tokens that the prefix cache has."
    )


class Objective(Spec):
    """Service level: percentiles that hold under the demand."""

    ttft_p95_s: PositiveFloat | None = Field(
        default=None, description="Time to first token, seconds."
    )
    tpot_p95_ms: PositiveFloat | None = Field(
        default=None, description="Time per output token, ms."
    )


class ReplicaBounds(Spec):
    """How many replicas may run. `min: 0` lets the model scale to zero."""

    min: NonNegativeInt = Field(default=1, description="0: the model may scale to zero.")
    max: PositiveInt = Field(default=1, description="At most so many.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            if "max" in self.model_fields_set:
                raise ValueError(f"min ({self.min}) is more than max ({self.max})")
            raise mistake(f"{self.min} is more than max, which is 1 unless given; give it", "min")
        return self


class ScalingPolicy(Spec):
    """How the replica count follows the load between `replicas.min` and `replicas.max`."""

    target_utilization: PositiveFloat = Field(
        default=0.7, le=1.0, description="Share of a replica's request slots that should be busy."
    )
    scale_up_delay_s: NonNegativeFloat = Field(
        default=1.0, description="Load must be high for this long."
    )
    scale_down_delay_s: NonNegativeFloat = Field(
        default=30.0, description="Load must be low for this long."
    )
    scale_to_zero_delay_s: NonNegativeFloat = Field(
        default=300.0, description="Idle for this long: to 0."
    )


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$"

# Flags of the engines that the planner writes, and the key of the fleet that sets each.
_PLANNED_FLAGS = {
    "--model": "model",
    "--tensor-parallel-size": "tensor_parallel_size",
    "-tp": "tensor_parallel_size",
    "--nnodes": "nodes_per_replica",
    "--enable-expert-parallel": "expert_parallel",
    "--enable-eplb": "eplb",
    "--eplb-config": "eplb",
    "--enable-lora": "lora",
    "--max-loras": "lora.max_loras",
    "--max-lora-rank": "lora.max_lora_rank",
    "--max-cpu-loras": "lora.max_cpu_loras",
    "--lora-modules": "adapters",
    "--max-model-len": "max_model_len",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--dtype": "dtype",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--kv-transfer-config": "disaggregate",
    "--ctx-size": "max_model_len",
    "--parallel": "max_num_seqs",
    "--batch-size": "max_num_batched_tokens",
    "--n-gpu-layers": "gpu_memory_utilization",
    "--n-cpu-moe": "gpu_memory_utilization",
    "--tensor-split": "gpu_memory_utilization",
    "--cache-type-k": "kv_cache_dtype",
    "--cache-type-v": "kv_cache_dtype",
}
_DATA_PARALLEL_FLAGS = ("--data-parallel-", "-dp")  # size, local size, ranks, address, ...


class Canary(Spec):
    """The next version of a model, beside the present one. What is not given is as in the model."""

    weight: float = Field(gt=0.0, lt=1.0, description="Share of the requests that it gets.")
    replicas: PositiveInt = Field(default=1, description="Its replicas; they do not scale.")
    model: str | None = Field(default=None, description="Another checkpoint.")
    revision: str | None = Field(default=None, description="Another one of the repository.")
    precision: tuple[Precision, ...] | None = Field(
        default=None, description="Other checkpoints of the model."
    )
    max_model_len: PositiveInt | None = Field(default=None, description="Tokens.")
    max_num_seqs: PositiveInt | None = Field(default=None, description="Requests at once.")
    engine_args: tuple[str, ...] | None = Field(
        default=None, description="Flags for the engine, instead of the model's."
    )

    @model_validator(mode="after")
    def _something_differs(self) -> Self:
        if not self.model_dump(exclude={"weight", "replicas"}, exclude_none=True):
            raise ValueError(
                "a canary differs from its model in `model`, `revision`, `precision`, "
                "`max_model_len`, `max_num_seqs` or `engine_args`; give what is new"
            )
        return self


class FleetModel(Spec):
    """One model that the fleet serves."""

    name: str = Field(
        min_length=1,
        pattern=_NAME,
        description="What clients send as `model`.",
    )
    aliases: tuple[str, ...] = Field(default=(), description="Other names that clients may send.")
    model: str = Field(description="Catalogue name, Hugging Face repo id or path.")
    revision: str | None = Field(
        default=None,
        min_length=1,
        pattern=r"^[\w.-]+(/[\w.-]+)*$",
        description="Branch, tag or commit of the repository; None: `main`. Branches and tags are "
        "those of the moment of the deployment.",
    )
    precision: Literal["any"] | Annotated[tuple[Precision, ...], Field(min_length=1)] = Field(
        default="any", description="Checkpoints that may be used; `any`: the planner chooses."
    )
    engine: Literal["vllm", "llamacpp", "sim"] = Field(
        default="vllm",
        description="`llamacpp`: GGUF files, layers that do not fit on GPUs stay in host memory; "
        "`sim`: no weights, timing as predicted.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of activations and unquantised weights; `auto`: 16 bits."
    )
    max_model_len: PositiveInt | None = Field(
        default=None, description="Tokens; None: the model's context."
    )
    max_num_seqs: PositiveInt | None = Field(
        default=None,
        description="Requests an engine runs at once; each of its data-parallel copies does.",
    )
    max_num_batched_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens an engine computes in one step; None: 8192, on `cpu` 2048, and 16,384 "
        "of all data-parallel copies together.",
    )
    gpu_memory_utilization: float = Field(
        default=0.92, gt=0.0, le=1.0, description="Share of a GPU's memory that an engine may take."
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        default="auto", description="`fp8` holds twice the tokens; `auto`: as `dtype`."
    )
    tensor_parallel_size: PositiveInt | None = Field(
        default=None, description="None: the planner chooses."
    )
    nodes_per_replica: PositiveInt = Field(
        default=1,
        description="More than 1: each replica takes so many whole nodes of a pool, with tensor "
        "parallelism inside them, and across them pipeline stages or, of a mixture of experts, "
        "copies of the attention (engines vllm and sim).",
    )
    data_parallel_size: PositiveInt | None = Field(
        default=None,
        description="Copies of the attention in a replica of a mixture of experts, each with "
        "requests and a KV cache of its own; the experts are spread over the GPUs of all copies. "
        "None: 1 on one node, over several what serves the objective.",
    )
    layer_partition: tuple[PositiveInt, ...] = Field(
        default=(), description="Layers of each pipeline stage; empty: as vLLM splits them."
    )
    expert_parallel: bool | None = Field(default=None, description="None: the planner chooses.")
    across_nodes: Literal["needed", "always", "never"] = Field(
        default="needed",
        description="Whether a replica's pipeline stages may stand on several nodes, also of pools "
        "with unlike GPUs, and its experts on several of one pool: `needed` where no node alone "
        "runs the model, `always` wherever that serves the objective.",
    )
    demand: Demand | None = Field(
        default=None, description="Load to plan for; None: start with `replicas.min`, at least 1."
    )
    slo: Objective = Field(default=Objective(), description="Latency to hold under the demand.")
    replicas: ReplicaBounds = Field(
        default=ReplicaBounds(), description="Between these the count follows the load."
    )
    pools: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="Only on these pools."
    )
    disaggregate: Literal["never", "allowed", "always"] = Field(
        default="never",
        description="Experimental: replicas that only read prompts, and replicas that only write "
        "answers, in shapes and on pools of their own; the KV cache goes over the network (vLLM's "
        "NixlConnector). `allowed`: where that serves the objective better; `always`: nothing else.",
    )
    spread: bool = Field(
        default=True,
        description="At most a quarter of the replicas on one node (of two or three: one), where "
        "there is room, and not all in one `zone` (a label of pools), where that costs nothing.",
    )
    scaling: ScalingPolicy = Field(
        default=ScalingPolicy(), description="How fast the count follows the load."
    )
    routing: RoutingPolicy = Field(
        default=RoutingPolicy(), description="How requests are spread over the replicas."
    )
    canary: Canary | None = Field(
        default=None, description="A next version that gets a share of the requests."
    )
    fallback: tuple[str, ...] = Field(
        default=(),
        description="Models of this fleet that answer in its place when it cannot, in this order.",
    )
    adapters: Mapping[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters of the model: what clients send as `model`, and a folder on the "
        "nodes or a Hugging Face repo id (REPO, or REPO@REVISION). They come and go while engines "
        "run.",
    )
    lora: LoraLimits | None = Field(
        default=None,
        description="Room for adapters. None: the defaults where there are `adapters`, otherwise "
        "none, so that the first adapter restarts the engines.",
    )
    eplb: ExpertBalance | None = Field(
        default=None,
        description="Balances the experts of replicas that spread them over several GPUs.",
    )
    simulate_gpu: str | None = Field(
        default=None, description="engine: sim only: the GPU type whose speed is simulated."
    )
    engine_args: tuple[str, ...] = Field(default=(), description="More flags for the engine.")

    @field_validator("engine_args")
    @classmethod
    def _none_that_is_planned(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        for flag in flags:
            name = flag.split("=")[0].replace("_", "-")
            key = _PLANNED_FLAGS.get(name)
            if name.startswith(_DATA_PARALLEL_FLAGS):
                key = "data_parallel_size"
            if key is not None:
                raise ValueError(f"{flag} would contradict the plan; use {key}")
        return flags

    @property
    def adapter_room(self) -> LoraLimits | None:
        """Room that engines keep for adapters; None: they take none."""
        return self.lora or (LoraLimits() if self.adapters else None)

    @field_validator("adapters")
    @classmethod
    def _adapters_have_names_and_sources(cls, adapters: Mapping[str, str]) -> Mapping[str, str]:
        for name, source in adapters.items():
            if not re.fullmatch(_NAME, name):
                raise ValueError(
                    f"an adapter cannot be called {name!r}: use letters, digits, ._/:-"
                )
            if not source.strip():
                raise ValueError(f"{name} has no source; give a folder or a Hugging Face repo id")
        return adapters

    @model_validator(mode="after")
    def _adapters_have_room(self) -> Self:
        room = self.adapter_room
        if room is None:
            return self
        if self.engine == "llamacpp":
            key = "lora" if self.lora else "adapters"
            raise ValueError(f"{key}: engine 'llamacpp' loads no adapters; use vllm")
        if self.eplb is not None:
            raise ValueError(
                "eplb: vLLM moves experts without their adapters, so that answers would be wrong; "
                "leave out either eplb, or adapters and lora"
            )
        if len(self.adapters) > room.max_cpu_loras:
            raise ValueError(
                f"{len(self.adapters)} adapters, but lora.max_cpu_loras is {room.max_cpu_loras}; "
                "raise it (engines restart), or leave adapters out"
            )
        return self

    @model_validator(mode="after")
    def _context_holds_the_demand(self) -> Self:
        if self.demand is None or self.max_model_len is None:
            return self
        tokens = self.demand.input_tokens.mean + self.demand.output_tokens.mean
        if tokens > self.max_model_len:
            raise mistake(
                f"{self.max_model_len} tokens are fewer than a usual request of the demand has, "
                f"prompt and answer: {tokens:g}; give more, or shorter input_tokens and "
                f"output_tokens",
                "max_model_len",
            )
        return self

    @model_validator(mode="after")
    def _llamacpp_splits_layers(self) -> Self:
        if self.engine == "llamacpp":
            split = {
                "tensor_parallel_size": 1,
                "nodes_per_replica": 1,
                "data_parallel_size": 1,
                "layer_partition": (),
                "expert_parallel": False,
                "dtype": "auto",
            }
            for key, only in split.items():
                if getattr(self, key) not in (None, only):
                    raise ValueError(
                        f"{key}: {getattr(self, key)} means nothing to engine 'llamacpp', which "
                        "gives each GPU whole layers; leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _caches_can_be_handed_over(self) -> Self:
        told = f"disaggregate: {self.disaggregate}"
        if self.disaggregate == "never":
            return self
        if self.engine == "llamacpp":
            raise ValueError(
                f"{told} means nothing to engine 'llamacpp', which hands no KV cache over; use "
                "vllm, or leave it out"
            )
        if self.canary is not None:
            raise ValueError(
                f"{told} beside a canary: the KV cache of one version means nothing to the other; "
                "leave out either"
            )
        if self.disaggregate == "always" and self.replicas.max == 1:
            raise ValueError(
                f"{told} takes at least two replicas, one that reads prompts and one that writes "
                "answers; set replicas.max to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _only_the_simulator_simulates(self) -> Self:
        if self.simulate_gpu is not None and self.engine != "sim":
            raise ValueError(
                f"simulate_gpu: {self.simulate_gpu} means nothing to engine {self.engine!r}; "
                "add `engine: sim`, or leave it out"
            )
        return self


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
