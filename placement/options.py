"""The legal ways to run each model of a fleet, with what they carry and cost; and why not others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from placement.candidate import Candidate
from placement.candidates import candidates, wanted_checkpoints
from placement.capacity import Capacity, capacity
from placement.catalogue import Catalogue, GpuType
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.legality import RULES, describe, first_rejection
from placement.llamacpp_options import LlamacppOption, llamacpp_options
from placement.memory import memory_use
from placement.performance import ReplicaSpeed, replica_speed
from placement.plan import Rejection, Shape
from placement.weight_bytes import GGUF_BITS

_FIDELITY = ("bf16", "fp16", "fp32", "fp8", "nvfp4", "gptq", "awq")


@dataclass(frozen=True, slots=True)
class Option:
    """A legal candidate on a pool."""

    pool: Pool
    gpu: GpuType  # of the pool; a simulation on a CPU pool believes in another
    candidate: Candidate
    speed: ReplicaSpeed
    capacity: Capacity
    gpus_per_replica: int
    replicas_needed: int  # for the demand, before replicas.max cuts it
    replicas: int  # to start with
    price_per_gpu_hour: float
    price_known: bool  # otherwise taken to be that of the dearest pool
    offloaded: bool = False
    shape: Shape | None = None  # llama.cpp's comes with the option; vLLM's follows from `candidate`

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
    wish: FleetModel, fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue
) -> Options:
    """Judge every candidate on every pool that `wish` allows; the legal ones best first.

    Raises:
        UnknownName: a pool, model or GPU type is not known.
    """
    pools = [inventory.pool(name) for name in wish.pools] if wish.pools else inventory.pools
    dearest = max((_price(pool, catalogue) or 0.0 for pool in inventory.pools), default=0.0)
    legal, illegal, rejected = [], [], []
    for _, pool in sorted({pool.name: pool for pool in pools}.items()):
        if wish.engine == "llamacpp":
            found, refused = llamacpp_options(wish, pool, catalogue)
            legal += [_llamacpp(wish, pool, each, catalogue, dearest=dearest) for each in found]
            rejected += [
                entry.model_copy(update={"shape": {**entry.shape, "pool": pool.name}})
                for entry in refused
            ]
            continue
        for candidate in candidates(wish, pool, catalogue):
            rejection = first_rejection(candidate)
            if rejection is None:
                legal.append(_option(wish, pool, candidate, catalogue, dearest=dearest))
                continue
            shape = {**rejection.shape, "model": wish.name, "pool": pool.name}
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


def _option(
    wish: FleetModel, pool: Pool, candidate: Candidate, catalogue: Catalogue, *, dearest: float
) -> Option:
    simulated = candidate.device.gpu.name != catalogue.gpu(pool.gpu).name
    slots = 1 if simulated else candidate.tensor_parallel_size
    speed = replica_speed(candidate)
    return _carrying(wish, pool, candidate, speed, catalogue, slots=slots, dearest=dearest)


def _llamacpp(
    wish: FleetModel, pool: Pool, found: LlamacppOption, catalogue: Catalogue, *, dearest: float
) -> Option:
    slots = found.gpus_per_replica
    option = _carrying(
        wish, pool, found.candidate, found.speed, catalogue, slots=slots, dearest=dearest
    )
    return replace(option, shape=found.shape, offloaded=found.offloaded)


def _carrying(
    wish: FleetModel,
    pool: Pool,
    candidate: Candidate,
    speed: ReplicaSpeed,
    catalogue: Catalogue,
    *,
    slots: int,
    dearest: float,
) -> Option:
    carried = capacity(
        speed,
        max_num_seqs=candidate.max_num_seqs,
        kv_cache_tokens=speed.kv_cache_tokens,
        demand=wish.demand,
        slo=wish.slo,
    )
    needed = 1
    if wish.demand is not None and carried.requests_per_s > 0:
        needed = math.ceil(wish.demand.requests_per_s / carried.requests_per_s)
    price = _price(pool, catalogue)
    return Option(
        pool=pool,
        gpu=catalogue.gpu(pool.gpu),
        candidate=candidate,
        speed=speed,
        capacity=carried,
        gpus_per_replica=slots,
        replicas_needed=needed,
        replicas=min(max(wish.replicas.min, needed), wish.replicas.max),
        price_per_gpu_hour=dearest if price is None else price,
        price_known=price is not None,
    )


def _preference(option: Option, wish: FleetModel, fleet: FleetSpec) -> tuple[object, ...]:
    """Options that carry the demand first, then the objective, cost, GPUs; the rest breaks ties."""
    precision = option.candidate.checkpoint.precision
    return (
        option.capacity.concurrency == 0,
        max(0, option.replicas_needed - option.replicas),
        value(option, wish, fleet),
        option.price_per_hour,
        not option.price_known,
        option.gpus,
        option.offloaded,
        -option.candidate.max_model_len,
        _FIDELITY.index(precision) if precision in _FIDELITY else len(_FIDELITY),
        -GGUF_BITS.get(precision, 0.0),
        option.candidate.tensor_parallel_size,
        option.pool.name,
        option.candidate.checkpoint.source,
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
