"""FleetModel: one model of a fleet, with what the operator may say of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from placement.catalogue import Precision
from placement.demand import Demand, Objective
from placement.planned_flags import planned_by
from placement.replica_counts import ReplicaBounds, ScalingPolicy
from placement.routing_policy import RoutingPolicy
from placement.serving_features import ExpertBalance, LoraLimits
from placement.spec import Spec, mistake

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$"


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
            key = planned_by(flag)
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
