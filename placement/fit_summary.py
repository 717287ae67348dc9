"""The verdict of `bora fit` in one sentence, with the numbers that decide."""

from __future__ import annotations

import math
from collections.abc import Sequence

from placement.candidate import GIB
from placement.catalogue import GpuType
from placement.fit_answer import FitShape
from placement.fit_checkpoints import Subject, Weights
from placement.fit_request import FitRequest
from placement.plan import Rejection

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_LAST_RULES = ("weights-exceed-memory", "pages-from-disk", "kv-cache-below-one-request")
_VERDICTS = {
    "fits": "fits",
    "tight": "fits, but only just: within the error of this estimate,",
    "offload": "runs only with part of the weights in host memory",
}


def runs(subject: Subject, request: FitRequest, gpu: GpuType, best: FitShape) -> str:
    """For instance: `m fits on 8 x H200-SXM: vllm fp8 TP8, context 262,144 ...`."""
    return (
        f"{subject.model.name} {_VERDICTS[best.verdict]} on {gpus_called(request, gpu)}: "
        f"{called(best)}, context {best.max_model_len:,}; {best.limit}"
    )


def does_not_run(
    subject: Subject,
    request: FitRequest,
    gpu: GpuType,
    *,
    weights: Sequence[Weights],
    rejected: Sequence[Rejection],
) -> str:
    """Sizes of weights and memory, and the rule that the closest shape breaks."""
    name, place = subject.model.name, gpus_called(request, gpu)
    if not weights:
        return f"{name} does not fit on {place}: {rejected[0].reason}"
    smallest = min(weights, key=lambda each: each.size_bytes)
    total = (gpu.memory_bytes or 0) * request.total_gpus
    memory = f"{total / 1e9:.0f} GB ({total / GIB:.1f} GiB) of GPU memory"
    if gpu.compute_capability is None:
        memory = f"{request.host_memory_gib or 0:g} GiB of host memory"
    sizes = (
        f"{smallest.precision} weights take {smallest.size_bytes / 1e9:.0f} GB "
        f"({smallest.size_bytes / GIB:.1f} GiB), there are {memory}"
    )
    nearest = closest(rejected)
    if nearest is None:
        return f"{name} does not fit on {place}: {sizes}; no shape uses exactly these GPUs"
    return f"{name} does not fit on {place}: {sizes}; {nearest.rule}: {nearest.reason}"


def gpus_called(request: FitRequest, gpu: GpuType) -> str:
    """`8 x H100-SXM`, `2 nodes of 8 x H100-SXM`, `the CPU`."""
    if gpu.compute_capability is None:
        return f"a CPU with {request.host_memory_gib or 0:g} GiB"
    gpus = f"{request.num_gpus} x {gpu.name}"
    return gpus if request.num_nodes == 1 else f"{request.num_nodes} nodes of {gpus}"


def called(shape: FitShape) -> str:
    """Engine, precision and parallel sizes in a few words."""
    words: list[str] = [shape.engine, shape.precision]
    if shape.engine == "llamacpp":
        words = ["llama.cpp", shape.precision]
        if shape.gpu_layers is not None and shape.gpus_per_replica > 1:
            words.append(f"{shape.gpus_per_replica} GPUs by layers")
        return " ".join(words)
    sizes = (
        ("TP", shape.tensor_parallel_size),
        ("PP", shape.pipeline_parallel_size),
        ("DP", shape.data_parallel_size),
    )
    words += [f"{short}{size}" for short, size in sizes if size > 1 or short == "TP"]
    if shape.expert_parallel:
        words.append("EP")
    return " ".join(words)


def closest(rejected: Sequence[Rejection]) -> Rejection | None:
    """The shape that came closest: broke the rule that is asked last, on the most GPUs."""

    def distance(entry: Rejection) -> tuple[int, int, int]:
        stage = _LAST_RULES.index(entry.rule) if entry.rule in _LAST_RULES else -1
        sizes = [int(entry.shape.get(size, 1)) for size in _SIZES]
        return (stage, math.prod(sizes), sizes[0])

    return max(rejected, key=distance, default=None)
