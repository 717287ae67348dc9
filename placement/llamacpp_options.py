"""Every way to run a fleet's model in llama.cpp on a pool: GGUF checkpoints x numbers of GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.candidate import GIB, Candidate, device_of
from placement.catalogue import Catalogue, GpuType, ModelSpec
from placement.costs import ReplicaSpeed
from placement.fit_checkpoints import Case, Subject, Weights, weights_to_try
from placement.fit_llamacpp import PlacedShape, placed_shapes
from placement.fit_request import FitRequest
from placement.fleet import FleetModel
from placement.inventory import Pool
from placement.llamacpp_speed import (
    UNCORRECTED,
    llamacpp_replica_speed,
    llamacpp_setup,
    predict_llamacpp,
)
from placement.plan import Rejection, Shape
from placement.setups import SpeedSetup

CPU_MAX_CONTEXT = 8192  # unless the fleet asks for more


@dataclass(frozen=True, slots=True)
class LlamacppOption:
    """A shape that runs, described also in the words that are common to all engines."""

    shape: Shape
    candidate: Candidate
    speed: ReplicaSpeed
    setup: SpeedSetup
    gpus_per_replica: int
    offloaded: bool  # weights that a GPU would read stay in host memory


def llamacpp_options(
    wish: FleetModel, pool: Pool, catalogue: Catalogue
) -> tuple[list[LlamacppOption], list[Rejection]]:
    """All GGUF checkpoints that `wish` allows, on 1, 2, 4 ... GPUs of a node, and why not others.

    Each GPU (or slot of a CPU) brings its share of the node's host memory: a replica that needs
    more of it takes more GPUs. Where the host memory is not known, a replica that keeps weights
    there has the node to itself.

    Raises:
        UnknownName: the model or GPU type is not known.
    """
    model, gpu = catalogue.model(wish.model), _gpu(pool, catalogue)
    on_cpu = gpu.compute_capability is None
    if on_cpu and wish.max_model_len is None:
        model = model.model_copy(update={"context": min(model.context, CPU_MAX_CONTEXT)})
    request = _request(wish, pool, on_cpu=on_cpu)
    subject = Subject(model, catalogue.gguf_weights.get(model.name))
    options, rejected = [], []
    for weights in _stored(subject, wish, request):
        case = Case(subject, weights, request, gpu, catalogue.calibration)
        for result in placed_shapes(case):
            made = result if isinstance(result, Rejection) else _option(wish, pool, case, result)
            if isinstance(made, Rejection):
                rejected.append(made)
            else:
                options.append(made)
    if not options and not rejected:
        rejected.append(_no_gguf(model, wish, gpu))
    return options, rejected


def _gpu(pool: Pool, catalogue: Catalogue) -> GpuType:
    gpu = catalogue.gpu(pool.gpu)
    if pool.memory_gib_per_gpu is None or gpu.compute_capability is None:
        return gpu
    return gpu.model_copy(update={"memory_bytes": int(pool.memory_gib_per_gpu * GIB)})


def _request(wish: FleetModel, pool: Pool, *, on_cpu: bool) -> FitRequest:
    host = pool.host_memory_gib
    if on_cpu:  # a pool of `cpu` always has it
        host = (pool.memory_gib_per_gpu or 0.0) * pool.gpus_per_node
    return FitRequest(
        gpu=pool.gpu,
        num_gpus=pool.gpus_per_node,
        engine="llamacpp",
        max_model_len=wish.max_model_len,
        max_num_seqs=wish.max_num_seqs,
        max_num_batched_tokens=wish.max_num_batched_tokens,
        gpu_memory_utilization=None if on_cpu else wish.gpu_memory_utilization,
        kv_cache_dtype=wish.kv_cache_dtype,
        host_memory_gib=host,
        kv_cache_gib=pool.kv_cache_gib_per_gpu if on_cpu else None,
    )


def _stored(subject: Subject, wish: FleetModel, request: FitRequest) -> list[Weights]:
    """GGUF files that exist; what would have to be converted first cannot be deployed."""
    model = subject.model
    sources = {entry.source for entry in model.checkpoints if entry.format == "gguf"}
    return [
        weights
        for weights in weights_to_try(subject, request)
        if weights.gguf is not None
        and weights.checkpoint.source in sources
        and (wish.precision == "any" or weights.precision in wish.precision)
    ]


def _option(
    wish: FleetModel, pool: Pool, case: Case, placed: PlacedShape
) -> LlamacppOption | Rejection:
    shape = placed.shape
    share = _share_of_host(pool, case.gpu)
    each = shape.gpus_per_replica
    if share is not None:
        each = max(each, math.ceil(shape.host_memory_bytes / share))
    elif shape.verdict == "offload":
        each = pool.gpus_per_node
    if each > pool.gpus_per_node:
        return Rejection(
            shape={"model": wish.name, "engine": "llamacpp", "precision": shape.precision},
            rule="host-memory-exceeded",
            reason=f"{shape.host_memory_bytes / GIB:.1f} GiB of host memory are needed, a node of "
            f"pool {pool.name} has {(share or 0) * pool.gpus_per_node / GIB:.1f} GiB",
        )
    task, placement = placed.task, placed.placement
    setup = llamacpp_setup(
        case.weights.checkpoint,
        case.gpu,
        task,
        placement,
        threads=each if case.gpu.compute_capability is None else None,
        engine_args=wish.engine_args,
    )
    seen = case.calibration.speed_correction(setup, UNCORRECTED.errors)
    told = {
        "prediction": predict_llamacpp(task, placement, case.gpu, case.request, correction=seen),
        "engine_args": (*shape.engine_args, *wish.engine_args),
    }
    plain = Shape.model_validate(shape.model_dump(include=set(Shape.model_fields)))
    return LlamacppOption(
        shape=plain.model_copy(update=told),
        candidate=_candidate(case, pool, placed.shape, wish),
        speed=llamacpp_replica_speed(
            task,
            placement,
            case.gpu,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            correction=seen,
        ),
        setup=setup,
        gpus_per_replica=each,
        offloaded=shape.verdict == "offload",
    )


def _share_of_host(pool: Pool, gpu: GpuType) -> float | None:
    """Bytes of host memory for each GPU; None: not known."""
    if gpu.compute_capability is None:
        return (pool.memory_gib_per_gpu or 0.0) * GIB
    return None if pool.host_memory_gib is None else pool.host_memory_gib * GIB / pool.gpus_per_node


def _candidate(case: Case, pool: Pool, shape: Shape, wish: FleetModel) -> Candidate:
    return Candidate(
        model=case.model,
        checkpoint=case.weights.checkpoint,
        device=device_of(pool, case.gpu),
        engine="llamacpp",
        pipeline_parallel_size=shape.pipeline_parallel_size,
        max_model_len=shape.max_model_len,
        max_num_seqs=shape.max_num_seqs,
        max_num_batched_tokens=shape.max_num_batched_tokens,
        gpu_memory_utilization=shape.gpu_memory_utilization,
        kv_cache_dtype=wish.kv_cache_dtype,
    )


def _no_gguf(model: ModelSpec, wish: FleetModel, gpu: GpuType) -> Rejection:
    wanted = "GGUF" if wish.precision == "any" else " or ".join(wish.precision) + " GGUF"
    have = sorted({entry.precision for entry in model.checkpoints if entry.format == "gguf"})
    return Rejection(
        shape={"model": wish.name, "gpu": gpu.name, "engine": "llamacpp"},
        rule="no-such-checkpoint",
        reason=f"{model.name} has no {wanted} checkpoint"
        + (f", only {', '.join(have)}" if have else "")
        + "; convert_hf_to_gguf.py and llama-quantize make one, whose path is given as `model`",
    )
