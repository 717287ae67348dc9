"""The cheapest ways out when a model does not fit as it was asked: each one tried before it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from placement.catalogue import Catalogue, GpuType, Precision
from placement.fit_answer import FitShape
from placement.fit_checkpoints import Subject, weights_to_try
from placement.fit_request import FitRequest
from placement.weight_bytes import GGUF_BITS

FindBest = Callable[[Subject, FitRequest, Catalogue], FitShape | None]
FOUR_BITS = 4.2  # per weight; coarser formats are no advice
_RUNS = ("fits", "tight")
_NODE_SIZES = (1, 2, 4, 8)
_MOST_GPUS, _MOST_NODES = 8, 8
# 16-bit formats in the order in which they are preferred, and the mean of the others' tensors.
_BITS: Mapping[str, float] = {
    "bf16": 16.0, "fp16": 15.9, "fp32": 15.8, "fp8": 8.0, "nvfp4": 4.5, "mxfp4": 4.25,
    "gptq": 4.24, "awq": 4.23,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and how to ask it again with changes."""

    subject: Subject
    request: FitRequest
    catalogue: Catalogue
    find_best: FindBest

    def again(self, **changes: Any) -> FitShape | None:
        """The best shape with these changes; None: nothing runs, or the options contradict."""
        try:
            changed = FitRequest.model_validate({**dict(self.request), **changes})
        except ValueError:
            return None
        return self.find_best(self.subject, changed, self.catalogue)

    def runs(self, **changes: Any) -> FitShape | None:
        """As `again`, if that is wholly on GPUs and in no coarser format than one would want."""
        shape = self.again(**changes)
        if shape is None or shape.verdict not in _RUNS:
            return None
        coarse = bits_per_weight(shape.precision) < FOUR_BITS
        return None if coarse and self.request.precision is None else shape


def bits_per_weight(precision: Precision) -> float:
    """Of the quantised tensors; equal formats differ a little, so that one is preferred."""
    return GGUF_BITS.get(precision) or _BITS[precision]


def advise(asked: Asked, best: FitShape | None) -> tuple[str, ...]:
    """Changes of one option each that make the model fit, or fit better; free ones first.

    Nothing when it fits with the whole context. Other precision, shorter context, smaller KV cache,
    other parallel sizes, more GPUs or nodes, offload, then the cheapest other GPU type.
    """
    if best is not None and best.verdict in _RUNS:
        if best.verdict == "fits" and best.max_model_len >= best.wanted_context:
            return ()
        return tuple(_for_more_context(asked, best))
    if asked.catalogue.gpu(asked.request.gpu).compute_capability is None:
        return tuple(_on_other_gpus(asked))
    ways = [_other_precision, _shorter_context, _smaller_cache, _free_sizes, _more_gpus]
    if best is None:
        ways.append(_offload)
    ways.append(_on_other_gpus)
    return tuple(advice for way in ways for advice in way(asked))


def _for_more_context(asked: Asked, best: FitShape) -> Iterator[str]:
    """It runs, but with less context than the model has, or only just."""
    request = asked.request
    if best.verdict == "tight" and best.max_num_seqs > 16:
        shape = asked.runs(max_num_seqs=16, max_num_batched_tokens=None)
        if shape is not None and shape.verdict == "fits":
            yield f"--max-num-seqs 16: {_result(shape)}"
    if request.kv_cache_dtype == "auto":
        shape = asked.runs(kv_cache_dtype="fp8", precision=best.precision)
        if shape is not None and shape.max_model_len > best.max_model_len:
            yield f"--kv-cache-dtype fp8: {_result(shape)}"
    for count in range(request.num_gpus + 1, 2 * _MOST_GPUS + 1):
        shape = asked.runs(num_gpus=count, precision=best.precision)
        enough = shape is not None and shape.max_model_len >= best.wanted_context
        if shape is not None and enough and shape.verdict == "fits":
            yield f"--gpu {request.gpu}:{count}: {_result(shape)}"
            return


def _other_precision(asked: Asked) -> Iterator[str]:
    if asked.request.precision is None:
        return
    shape = asked.again(precision=None, engine=None)
    if shape is not None and shape.verdict in _RUNS:
        yield f"--precision {shape.precision}: {_result(shape)}"


def _shorter_context(asked: Asked) -> Iterator[str]:
    if asked.request.max_model_len is None:
        return
    shape = asked.runs(max_model_len=None)
    if shape is not None and shape.max_model_len < asked.request.max_model_len:
        yield f"--max-model-len {shape.max_model_len}: {_result(shape)}"


def _smaller_cache(asked: Asked) -> Iterator[str]:
    """Fewer request slots, or an 8-bit cache."""
    if (asked.request.max_num_seqs or 0) > 16:
        shape = asked.runs(max_num_seqs=16, max_num_batched_tokens=None)
        if shape is not None:
            yield f"--max-num-seqs 16: {_result(shape)}"
    if asked.request.kv_cache_dtype == "auto":
        shape = asked.runs(kv_cache_dtype="fp8")
        if shape is not None:
            yield f"--kv-cache-dtype fp8: {_result(shape)}"


def _free_sizes(asked: Asked) -> Iterator[str]:
    """Without the parallel sizes that were asked for."""
    names = (
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "expert_parallel",
    )  # fmt: skip
    if all(getattr(asked.request, name) is None for name in names):
        return
    shape = asked.runs(**dict.fromkeys(names))
    if shape is not None:
        yield f"other parallel sizes: {_result(shape)}"


def _more_gpus(asked: Asked) -> Iterator[str]:
    """The smallest node, else the fewest nodes, with this GPU type."""
    request, gpu = asked.request, asked.catalogue.gpu(asked.request.gpu)
    if request.num_nodes == 1:
        for count in range(request.num_gpus + 1, _MOST_GPUS + 1):
            shape = asked.runs(num_gpus=count) if _has_room(asked, gpu, count) else None
            if shape is not None:
                yield f"--gpu {request.gpu}:{count}: {_result(shape)}"
                return
    count = max(request.num_gpus, _MOST_GPUS)
    for nodes in range(request.num_nodes + 1, _MOST_NODES + 1):
        shape = None
        if _has_room(asked, gpu, nodes * count):
            shape = asked.runs(num_gpus=count, num_nodes=nodes)
        if shape is not None:
            yield f"--gpu {request.gpu}:{count} --nodes {nodes}: {_result(shape)}"
            return


def _offload(asked: Asked) -> Iterator[str]:
    """Llama.cpp with part of a GGUF in host memory, whatever the host has now."""
    changes = {"engine": "llamacpp", "host_memory_gib": None, "tensor_parallel_size": None}
    for precision in ("q4_k_m", None):
        shape = asked.again(**changes, precision=precision, expert_parallel=None)
        if shape is not None and shape.verdict == "offload":
            host = shape.host_memory_bytes / 2**30
            yield (
                f"--engine llamacpp --precision {shape.precision} on a host with {host:.0f} GiB of "
                f"memory: {_result(shape)}"
            )
            return


def _on_other_gpus(asked: Asked) -> Iterator[str]:
    """The cheapest node of another GPU type that the model fits on."""
    catalogue = asked.catalogue
    offers = sorted(
        (gpu.price_per_hour * count, gpu.name, count)
        for gpu in catalogue.gpus.values()
        for count in _NODE_SIZES
        if gpu.price_per_hour is not None
        and gpu.compute_capability is not None
        and gpu.name != catalogue.gpu(asked.request.gpu).name
        and _has_room(asked, gpu, count)
    )
    for price, name, count in offers:
        shape = asked.runs(gpu=name, num_gpus=count, num_nodes=1)
        if shape is not None and shape.verdict == "fits":
            yield f"--gpu {name}:{count} ({price:.2f} USD/h): {_result(shape)}"
            return


def _has_room(asked: Asked, gpu: GpuType, count: int) -> bool:
    """Whether the GPUs together are larger than the smallest weights, before asking in earnest."""
    weights = weights_to_try(asked.subject, asked.request)
    sizes = [
        each.size_bytes
        for each in weights
        if asked.request.precision is not None or bits_per_weight(each.precision) >= FOUR_BITS
    ]
    return bool(sizes) and (gpu.memory_bytes or 0) * count > min(sizes)


def _result(shape: FitShape) -> str:
    words = f"{shape.verdict} as {shape.engine} {shape.precision}"
    if shape.gpus_per_replica > 1:
        words += f" on {shape.gpus_per_replica} GPUs"
    if shape.verdict == "offload":
        return f"{words}, {shape.limit}, about {1000 / shape.prediction.tpot_ms:.1f} tokens/s"
    return f"{words}, context {shape.max_model_len:,}, {shape.kv_cache_tokens:,} tokens of KV cache"
