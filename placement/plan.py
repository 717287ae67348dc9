"""Plan: the planner's answer, a frozen value with placements, predictions and reasons."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from placement.catalogue import Precision
from placement.easing import Easing
from placement.fleet import Demand, GatewaySpec, Objective, ReplicaBounds, ScalingPolicy
from placement.model_cache import ModelCacheSpec
from placement.planned_speed import PlannedSpeed
from placement.routing_policy import Role, RoutingPolicy
from placement.spec import Spec


class GpuMemory(Spec):
    """Where one GPU's memory goes, bytes. On a `cpu` rank the KV cache is a fixed budget."""

    total_bytes: int
    weights_bytes: int
    adapter_bytes: int = Field(default=0, description="Set aside for LoRA adapters.")
    activation_bytes: int
    non_torch_bytes: int
    cuda_graph_bytes: int
    kv_cache_bytes: int
    headroom_bytes: int


class Prediction(Spec):
    """Speed of one replica under the load that was asked about."""

    ttft_s: float
    tpot_ms: float
    output_tokens_per_s: float = Field(description="Of the whole replica.")
    ttft_error: float | None = Field(
        default=None, description="Relative, as runs differed that were not fitted to, on average."
    )
    tpot_error: float | None = Field(default=None, description="The same of tpot_ms.")


class Shape(Spec):
    """How one replica runs: engine, checkpoint, parallel sizes, limits, and what follows from it."""

    engine: Literal["vllm", "llamacpp", "sim"]
    precision: Precision
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    num_nodes: int = Field(
        default=1,
        description="Nodes that one replica spreads over, each with as many ranks; one that gives "
        "more GPUs than another counts as several.",
    )
    layer_partition: tuple[int, ...] = Field(
        default=(), description="Layers of each pipeline stage; empty: as the engine splits them."
    )
    expert_parallel: bool = False
    max_model_len: int
    max_num_seqs: int = Field(description="Of each data-parallel copy.")
    max_num_batched_tokens: int = Field(description="Of each data-parallel copy.")
    gpu_memory_utilization: float
    kv_cache_dtype: str = "auto"
    per_gpu: GpuMemory
    kv_bytes_per_token: int = Field(description="Per GPU (rank).")
    kv_cache_tokens: int = Field(
        description="Of the whole replica; the engine logs it for each data-parallel copy."
    )
    max_concurrency: float = Field(description="Requests of max_model_len that the KV cache holds.")
    num_layers: int
    gpu_layers: int | None = None
    host_memory_bytes: int = 0
    prediction: Prediction
    engine_args: tuple[str, ...] = ()
    engine_environment: Mapping[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = Field(
        default=(), description="What is legal but costs speed or deserves a look."
    )

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def request_slots(self) -> int:
        """Requests that one replica runs at once."""
        return self.max_num_seqs * self.data_parallel_size


class Rejection(Spec):
    """A shape that was looked at and is not possible."""

    shape: dict[str, str | int | bool]
    rule: str
    reason: str


class NodeGpus(Spec):
    """GPUs of one node."""

    node: str
    gpus: tuple[int, ...]


def hardware_in_words(nodes: Iterable[tuple[int, str]]) -> str:
    """GPUs of nodes, with their type; nodes that follow each other and are alike as one."""
    words = []
    for (gpus, name), alike in itertools.groupby(nodes):
        count = len(list(alike))
        words.append(f"{gpus} x {name}" if count == 1 else f"{count} x ({gpus} x {name})")
    return " + ".join(words)


class StageNodes(Spec):
    """Nodes that a pipeline goes on to, and what it takes of each."""

    pool: str
    gpu: str
    gpus: int


class Predicted(Spec):
    """What a variant's users will see."""

    ttft_p95_s: float
    tpot_p95_ms: float
    utilization: float = Field(description="Demand over capacity; 0 without a demand.")


class Variant(Spec):
    """A model in one shape on one pool: one Ray Serve deployment."""

    model: str = Field(description="The fleet's name for it: what clients send.")
    variant: str = Field(description="MODEL@POOL-SHAPE")
    aliases: tuple[str, ...] = ()
    adapters: Mapping[str, str] = Field(
        default_factory=dict, description="Name of an adapter: its folder or repo id."
    )
    catalogue_model: str = Field(description="Catalogue name, or the path or repo id given.")
    checkpoint: str = Field(description="Where the weights come from.")
    checkpoint_format: Literal["hf", "mistral", "gguf"] = "hf"
    revision: str = Field(default="main", description="Of the repository: branch, tag or commit.")
    commit: str = Field(
        default="", description="That `revision` stood for when it was deployed; empty: unknown."
    )
    model_cache: ModelCacheSpec = ModelCacheSpec()
    pool: str
    gpu: str
    beside: tuple[StageNodes, ...] = Field(
        default=(), description="Where a pipeline goes on that begins on `pool`, stage by stage."
    )
    simulated_gpu: str | None = None
    shape: Shape
    role: Role = Field(
        default="whole",
        description="`prefill`: reads prompts and hands their KV cache over; `decode`: writes the "
        "answers, and reads prompts itself where nobody handed it a cache.",
    )
    replicas: int = Field(description="To start with.")
    bounds: ReplicaBounds
    scaling: ScalingPolicy
    slo: Objective = Objective()
    gpus_per_replica: int = Field(
        default=1, description="GPUs (on a `cpu` pool: slots) that one replica occupies."
    )
    price_per_hour: float = Field(default=0.0, description="Of all replicas.")
    placement: tuple[tuple[NodeGpus, ...], ...] = Field(
        description="For each replica, its GPUs. Over several nodes: in the order of its ranks "
        "((copy x pipeline_parallel_size + stage) x tensor_parallel_size + position), as many GPUs "
        "in each entry; a node that gives more has more than one. So data-parallel copy r is on "
        "entry r // (data_parallel_size / num_nodes)."
    )
    capacity_requests_per_s: float = Field(description="Of one replica, within the SLO.")
    limited_by: str = Field(
        default="",
        description="The promise that more load would break; empty: the engine's limits.",
    )
    predicted: Predicted
    speed: PlannedSpeed | None = Field(
        default=None,
        description="What predictions follow from; None: of an older plan, or in a role, which "
        "is never measured.",
    )
    capabilities: tuple[str, ...] = ()
    routing: RoutingPolicy = RoutingPolicy()
    fallback: tuple[str, ...] = Field(default=(), description="Models that may answer instead.")

    @property
    def pools(self) -> tuple[str, ...]:
        """Of the nodes that a replica spreads over, in the order of its stages."""
        return (self.pool, *(nodes.pool for nodes in self.beside))

    @property
    def rank_pools(self) -> tuple[str, ...]:
        """The pool of each entry of a replica's placement."""
        each = self.gpus_per_replica // self.shape.num_nodes
        others = [nodes.pool for nodes in self.beside for _ in range(nodes.gpus // each)]
        return (*(self.pool,) * (self.shape.num_nodes - len(others)), *others)

    @property
    def hardware(self) -> str:
        """The GPUs of a replica in words."""
        first = self.gpus_per_replica - sum(nodes.gpus for nodes in self.beside)
        return hardware_in_words([(first, self.gpu), *((n.gpus, n.gpu) for n in self.beside)])


class Unmet(Spec):
    """A wish that the inventory cannot fulfil."""

    model: str
    constraint: str
    cheapest_relaxation: str
    easing: Easing = Field(
        default=Easing(), description="The first of these ways as a value; empty: words only."
    )


class Robustness(Spec):
    """What happens to the plan when engines are 15 % slower and find 5 % less memory."""

    holds: bool = Field(description="Every model still meets its demand and service level.")
    short: tuple[str, ...] = Field(default=(), description="Models that would not.")
    objective_to_hold: float | None = Field(
        default=None, description="Of the best plan that holds (`robust: require`)."
    )


class NodeLoss(Spec):
    """What happens when any one node is lost, in the worst case."""

    carried: bool = Field(description="Every model still carries its demand, at once.")
    restarts: bool = Field(description="Whichever it is, free GPUs of its pool take its replicas.")
    node: str = Field(description="Whose loss leaves least of a demand.")
    model: str
    share: float = Field(description="Of that model's demand, which its other replicas carry.")
    restart_s: float | None = Field(
        description="Until that node's replicas run again on free GPUs; None: there is no room."
    )

    @property
    def in_words(self) -> str:
        """One line."""
        left = f"without {self.node}, {self.model} carries {100 * self.share:.0f} % of its demand"
        if self.carried:
            return f"survives the loss of any one node: yes, slowest case: {left}"
        again = "and there is no room to start its replicas again"
        if self.restart_s is not None:
            again = f"until its replicas run again on free GPUs, after {self.restart_s:.0f} s"
        return f"survives the loss of any one node: no, {left}, {again}"


class Plan(Spec):
    """The whole answer for a fleet on an inventory."""

    fleet: str
    status: Literal["optimal", "feasible", "infeasible"]
    objective: float
    bound: float
    gap: float
    solve_s: float = 0.0
    cost_per_hour: float
    currency: str = "USD"
    gpus_used: int
    gpus_total: int
    variants: tuple[Variant, ...]
    unmet: tuple[Unmet, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    unpriced: tuple[str, ...] = Field(
        default=(), description="Pools in use whose price nobody knows: as dear as the dearest."
    )
    robustness: Robustness | None = None
    node_loss: NodeLoss | None = Field(
        default=None, description="None: nothing runs, or there is but one node."
    )
    gateway: GatewaySpec = GatewaySpec()
    demands: Mapping[str, Demand] = Field(
        default_factory=dict, description="What was planned for, by model; those without: none."
    )

    @classmethod
    def empty(cls) -> Plan:
        """Of a cluster that serves nothing."""
        return cls(
            fleet="none",
            status="optimal",
            objective=0.0,
            bound=0.0,
            gap=0.0,
            cost_per_hour=0.0,
            gpus_used=0,
            gpus_total=0,
            variants=(),
        )
