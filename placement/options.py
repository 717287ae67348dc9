"""The legal ways to run each model of a fleet, with what they carry and cost; and why not others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.candidate import Candidate
from placement.candidates import candidates, wanted_checkpoints
from placement.capacity import Capacity, capacity
from placement.catalogue import Catalogue, GpuType
from placement.fleet import FleetModel, FleetSpec, Objective
from placement.inventory import Pool
from placement.legality import RULES, describe, first_rejection
from placement.llamacpp_options import LlamacppOption, llamacpp_options
from placement.memory import memory_use
from placement.node_groups import NodeGroup
from placement.performance import ReplicaSpeed, replica_speed
from placement.plan import Rejection, Shape
from placement.weight_bytes import GGUF_BITS

SPEED_ERROR = 0.15  # what predictions may be wrong by, for `robust` in a fleet
MEMORY_ERROR = 0.05
_FIDELITY = ("bf16", "fp16", "fp32", "fp8", "nvfp4", "gptq", "awq")


@dataclass(frozen=True, slots=True)
class Option:
    """A legal candidate on a group of nodes."""

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
    offloaded: bool = False  # llama.cpp: weights that a GPU would read stay in host memory
    shape: Shape | None = None  # where it does not follow from `candidate`

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.gpus_per_replica

    @property
    def price_per_hour(self) -> float:
        """Of all replicas."""
        return self.gpus * self.price_per_gpu_hour


@dataclass(frozen=True, slots=True)
class Options:
    """What was found for one model of the fleet."""

    wish: FleetModel
    legal: tuple[Option, ...]
    illegal: tuple[tuple[Candidate, Rejection], ...]
    rejected: tuple[Rejection, ...]


def find_options(
    wish: FleetModel, fleet: FleetSpec, groups: Sequence[NodeGroup], catalogue: Catalogue
) -> Options:
    """Judge every candidate on every group of nodes that `wish` allows; the legal ones best first.

    Raises:
        UnknownName: a model or GPU type is not known.
    """
    dearest = max((_price(group.pool, catalogue) or 0.0 for group in groups), default=0.0)
    legal, illegal, rejected = [], [], []
    for index, group in enumerate(groups):
        if wish.pools is not None and group.pool.name not in wish.pools:
            continue
        if wish.engine == "llamacpp":
            found, refused = llamacpp_options(wish, group.pool, catalogue)
            for each in found:
                option = _llamacpp(wish, index, group, each, catalogue, dearest=dearest)
                legal.append(_as_stressed(option, wish) if fleet.robust == "require" else option)
            rejected += [
                entry.model_copy(update={"shape": {**entry.shape, "pool": group.name}})
                for entry in refused
            ]
            continue
        for candidate in candidates(wish, group.pool, catalogue):
            rejection = first_rejection(candidate)
            if rejection is None:
                option = _option(wish, index, group, candidate, catalogue, dearest=dearest)
                if fleet.robust == "require":
                    option = _as_stressed(option, wish)
                legal.append(option)
                continue
            shape = {**rejection.shape, "model": wish.name, "pool": group.name}
            illegal.append((candidate, rejection))
            rejected.append(rejection.model_copy(update={"shape": shape}))
    if wish.engine != "llamacpp":
        rejected += _missing_checkpoints(wish, catalogue)
    legal.sort(key=lambda option: _preference(option, wish, fleet))
    return Options(wish=wish, legal=tuple(legal), illegal=tuple(illegal), rejected=tuple(rejected))


def value(option: Option, wish: FleetModel, fleet: FleetSpec) -> float:
    """What the fleet's objective makes of an option; less is better.

    cost: price per hour, where a GPU whose price nobody knows counts as dear as the dearest. throughput: requests/s of all replicas, negative. headroom: the share of
    the capacity that the demand takes.
    """
    total = option.replicas * option.capacity.requests_per_s
    if fleet.objective == "throughput":
        return -total
    if fleet.objective == "headroom":
        return wish.demand.requests_per_s / total if wish.demand and total else 0.0
    return option.price_per_hour


def furthest(options: Options) -> tuple[Candidate, Rejection] | None:
    """The rejected candidate that came closest: broke the last rule, by the least."""
    order = list(RULES)

    def distance(entry: tuple[Candidate, Rejection]) -> tuple[int, int, str]:
        candidate, rejection = entry
        stage = order.index(rejection.rule)
        missing = memory_use(candidate).missing_bytes if candidate.device.memory_bytes else 0
        return (-stage, missing, str(describe(candidate)))

    return min(options.illegal, key=distance, default=None)


def _price(pool: Pool, catalogue: Catalogue) -> float | None:
    if pool.price_per_gpu_hour is not None:
        return pool.price_per_gpu_hour
    return catalogue.gpu(pool.gpu).price_per_hour


def stressed(option: Option, wish: FleetModel) -> Capacity:
    """What a replica carries whose engine is 15 % slower and finds 5 % less memory.

    Slower by a factor: every prediction grows by it, so the service level is that much nearer.
    """
    candidate, speed, legal = option.candidate, option.speed, True
    device = candidate.device
    if option.shape is None and device.memory_bytes is not None and not device.is_cpu:
        less = int(device.memory_bytes * (1 - MEMORY_ERROR))
        candidate = replace(candidate, device=replace(device, memory_bytes=less))
        speed = replica_speed(candidate)
        legal = first_rejection(candidate) is None
    slower = 1 - SPEED_ERROR
    slo = Objective(
        ttft_p95_s=wish.slo.ttft_p95_s and wish.slo.ttft_p95_s * slower,
        tpot_p95_ms=wish.slo.tpot_p95_ms and wish.slo.tpot_p95_ms * slower,
    )
    carried = _carried(wish, candidate, speed, slo)
    if not legal:
        return replace(carried, concurrency=0, requests_per_s=0.0)
    return replace(carried, requests_per_s=slower * carried.requests_per_s)


def _as_stressed(option: Option, wish: FleetModel) -> Option:
    carried = stressed(option, wish)
    needed = _needed(wish, carried)
    replicas = min(max(wish.replicas.min, needed), wish.replicas.max)
    return replace(option, capacity=carried, replicas_needed=needed, replicas=replicas)


def _needed(wish: FleetModel, carried: Capacity) -> int:
    if wish.demand is None or carried.requests_per_s <= 0:
        return 1
    return math.ceil(wish.demand.requests_per_s / carried.requests_per_s)


def _carried(
    wish: FleetModel, candidate: Candidate, speed: ReplicaSpeed, slo: Objective
) -> Capacity:
    return capacity(
        speed,
        max_num_seqs=candidate.max_num_seqs,
        kv_cache_tokens=speed.kv_cache_tokens,
        demand=wish.demand,
        slo=slo,
    )


def _option(
    wish: FleetModel,
    index: int,
    group: NodeGroup,
    candidate: Candidate,
    catalogue: Catalogue,
    *,
    dearest: float,
) -> Option:
    simulated = candidate.device.gpu.name != catalogue.gpu(group.pool.gpu).name
    return _carrying(
        wish,
        group,
        candidate,
        replica_speed(candidate),
        catalogue,
        index=index,
        slots=1 if simulated else candidate.num_ranks,
        dearest=dearest,
    )


def _llamacpp(
    wish: FleetModel,
    index: int,
    group: NodeGroup,
    found: LlamacppOption,
    catalogue: Catalogue,
    *,
    dearest: float,
) -> Option:
    option = _carrying(
        wish,
        group,
        found.candidate,
        found.speed,
        catalogue,
        index=index,
        slots=found.gpus_per_replica,
        dearest=dearest,
    )
    return replace(option, shape=found.shape, offloaded=found.offloaded)


def _carrying(
    wish: FleetModel,
    group: NodeGroup,
    candidate: Candidate,
    speed: ReplicaSpeed,
    catalogue: Catalogue,
    *,
    index: int,
    slots: int,
    dearest: float,
) -> Option:
    carried = _carried(wish, candidate, speed, wish.slo)
    needed = _needed(wish, carried)
    price = _price(group.pool, catalogue)
    return Option(
        group=index,
        pool=group.pool,
        gpu=catalogue.gpu(group.pool.gpu),
        candidate=candidate,
        speed=speed,
        capacity=carried,
        gpus_per_replica=slots,
        replicas_needed=needed,
        replicas=min(max(wish.replicas.min, needed), wish.replicas.max),
        price_per_gpu_hour=dearest if price is None else price,
        price_known=price is not None,
    )


def quality(option: Option) -> tuple[object, ...]:
    """Among options on the same GPUs: the longest context, then the nearest to the original."""
    candidate = option.candidate
    precision = candidate.checkpoint.precision
    return (
        option.offloaded,
        -candidate.max_model_len,
        _FIDELITY.index(precision) if precision in _FIDELITY else len(_FIDELITY),
        -GGUF_BITS.get(precision, 0.0),
        candidate.tensor_parallel_size,
        candidate.pipeline_parallel_size,
        option.pool.name,
        candidate.checkpoint.source,
    )


def _preference(option: Option, wish: FleetModel, fleet: FleetSpec) -> tuple[object, ...]:
    """Options that carry the demand first, then the objective, cost, GPUs; the rest breaks ties."""
    return (
        option.capacity.concurrency == 0,
        max(0, option.replicas_needed - option.replicas),
        value(option, wish, fleet),
        option.price_per_hour,
        not option.price_known,
        option.gpus,
        quality(option),
    )


def _missing_checkpoints(wish: FleetModel, catalogue: Catalogue) -> list[Rejection]:
    model = catalogue.model(wish.model)
    if wish.precision == "any":
        return []
    have = sorted({checkpoint.precision for checkpoint in model.checkpoints})
    found = {checkpoint.precision for checkpoint in wanted_checkpoints(wish, model)}
    return [
        Rejection(
            shape={"model": wish.name, "precision": precision},
            rule="no-such-checkpoint",
            reason=f"{model.name} has no {precision} checkpoint, only {', '.join(have)}",
        )
        for precision in wish.precision
        if precision not in found
    ]
