"""An option: a legal way to run a model on a group of nodes, with what it carries and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from placement.candidate import Candidate, Device
from placement.capacity import Capacity, capacity
from placement.catalogue import GpuType
from placement.fleet import FleetModel, Objective
from placement.inventory import Pool
from placement.legality import first_rejection
from placement.performance import ReplicaSpeed, replica_speed
from placement.plan import Shape, hardware_in_words
from placement.role_capacity import NO_HANDOVER, Handover, decode_capacity, prefill_capacity
from placement.setups import SpeedSetup
from placement.weight_bytes import GGUF_BITS

SPEED_ERROR = 0.15  # what predictions may be wrong by, for `robust` in a fleet
MEMORY_ERROR = 0.05
_FIDELITY = ("bf16", "fp16", "fp32", "fp8", "nvfp4", "gptq", "awq")


@dataclass(frozen=True, slots=True)
class Part:
    """What a replica takes of one node."""

    group: int
    pool: Pool  # that stands for the group
    gpu: GpuType
    gpus: int
    price_per_gpu_hour: float


@dataclass(frozen=True, slots=True)
class Option:
    """A legal candidate on a group of nodes, or with its stages on several."""

    group: int
    pool: Pool  # that stands for the group
    gpu: GpuType  # of the pool; a simulation on a CPU pool believes in another
    candidate: Candidate
    speed: ReplicaSpeed
    capacity: Capacity
    gpus_per_replica: int
    replicas_needed: int  # for the demand, before replicas.max cuts it
    replicas: int  # to start with
    price_per_gpu_hour: float
    price_known: bool  # otherwise taken to be that of the dearest pool
    offloaded: bool = False  # weights that a GPU would read stay in host memory
    shape: Shape | None = None  # llama.cpp's comes with the option; vLLM's follows from `candidate`
    setup: SpeedSetup | None = None  # as `shape`
    beside: tuple[Part, ...] = ()  # nodes of a pipeline beyond its first, in the stages' order
    handover: Handover = NO_HANDOVER  # of KV caches, where it reads prompts or writes answers only

    @property
    def gpus_here(self) -> int:
        """Of a replica, on its first node."""
        return self.gpus_per_replica - sum(part.gpus for part in self.beside)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a replica takes of each node."""
        first = Part(self.group, self.pool, self.gpu, self.gpus_here, self.price_per_gpu_hour)
        return (first, *self.beside)

    @property
    def hardware(self) -> str:
        """The GPUs of a replica in words."""
        return hardware_in_words((part.gpus, part.gpu.name) for part in self.parts)

    @property
    def price_per_replica(self) -> float:
        """Per hour."""
        return sum(part.gpus * part.price_per_gpu_hour for part in self.parts)

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.gpus_per_replica

    @property
    def price_per_hour(self) -> float:
        """Of all replicas."""
        return self.replicas * self.price_per_replica


def carried(
    wish: FleetModel,
    candidate: Candidate,
    speed: ReplicaSpeed,
    slo: Objective,
    handover: Handover = NO_HANDOVER,
) -> Capacity:
    """What a replica carries at the fleet's demand, within `slo`: in a role, of its own part."""
    if candidate.role == "prefill":
        return prefill_capacity(speed, demand=wish.demand, slo=slo, handover=handover)
    if candidate.role == "decode":
        return decode_capacity(
            speed,
            max_num_seqs=candidate.max_num_seqs,
            demand=wish.demand,
            slo=slo,
            handover=handover,
        )
    return capacity(
        speed,
        max_num_seqs=candidate.max_num_seqs,
        kv_cache_tokens=speed.kv_cache_tokens,
        demand=wish.demand,
        slo=slo,
    )


def replicas_needed(wish: FleetModel, each: Capacity) -> int:
    """Replicas for the demand, whatever `replicas.max` says."""
    if wish.demand is None or each.requests_per_s <= 0:
        return 1
    return math.ceil(wish.demand.requests_per_s / each.requests_per_s)


def stressed(option: Option, wish: FleetModel) -> Capacity:
    """What a replica carries whose engine is 15 % slower and finds 5 % less memory.

    Slower by a factor: every prediction grows by it, so the service level is that much nearer.
    vLLM makes do with a smaller cache; llama.cpp's flags say what lies where, so it must still fit.
    """
    candidate, speed, legal = option.candidate, option.speed, True
    device = candidate.device
    if device.is_cpu or device.memory_bytes is None:
        pass  # its cache is a budget, not what is left over
    elif option.shape is not None:
        legal = option.shape.per_gpu.headroom_bytes >= MEMORY_ERROR * device.memory_bytes
    else:
        candidate = with_less_memory(candidate)
        speed = replica_speed(candidate)
        legal = first_rejection(candidate) is None
    slower = 1 - SPEED_ERROR
    slo = Objective(
        ttft_p95_s=wish.slo.ttft_p95_s and wish.slo.ttft_p95_s * slower,
        tpot_p95_ms=wish.slo.tpot_p95_ms and wish.slo.tpot_p95_ms * slower,
    )
    slow = carried(wish, candidate, speed, slo, option.handover)
    if not legal:
        return replace(slow, concurrency=0, requests_per_s=0.0)
    return replace(slow, requests_per_s=slower * slow.requests_per_s)


def with_less_memory(candidate: Candidate) -> Candidate:
    """On devices that have 5 % less memory than is thought."""

    def smaller(device: Device) -> Device:
        return replace(device, memory_bytes=int((device.memory_bytes or 0) * (1 - MEMORY_ERROR)))

    return replace(
        candidate,
        device=smaller(candidate.device),
        rank_devices=tuple(map(smaller, candidate.rank_devices)),
    )


def as_stressed(option: Option, wish: FleetModel) -> Option:
    """The option as if what `stressed` supposes were certain."""
    slow = stressed(option, wish)
    needed = replicas_needed(wish, slow)
    replicas = min(max(wish.replicas.min, needed), wish.replicas.max)
    return replace(option, capacity=slow, replicas_needed=needed, replicas=replicas)


def ranks(option: Option) -> str:
    """How its GPUs share the model, as it stands in a variant's name."""
    candidate = option.candidate
    stages = candidate.pipeline_parallel_size
    if candidate.engine == "llamacpp":
        return f"gguf-{candidate.checkpoint.precision}-pp{stages}"
    sizes = [("tp", candidate.tensor_parallel_size)]
    sizes += [("pp", stages)] if stages > 1 else []
    sizes += [("dp", candidate.data_parallel_size)] if candidate.data_parallel_size > 1 else []
    over = [f"{len(option.parts)}nodes"] if option.beside else []
    return "-".join([*(f"{kind}{size}" for kind, size in sizes), *over])


def quality(option: Option) -> tuple[object, ...]:
    """Among options on the same GPUs: all on GPUs, the longest context, the nearest to the original."""
    candidate = option.candidate
    precision = candidate.checkpoint.precision
    return (
        option.offloaded,
        -candidate.max_model_len,
        _FIDELITY.index(precision) if precision in _FIDELITY else len(_FIDELITY),
        -GGUF_BITS.get(precision, 0.0),
        candidate.tensor_parallel_size,
        candidate.pipeline_parallel_size,
        candidate.data_parallel_size,
        option.pool.name,
        candidate.checkpoint.source,
    )
