"""The shapes in which llama.cpp can run a GGUF file on some GPUs, with what stays in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from placement.candidate import GIB
from placement.catalogue import GpuType
from placement.fit_answer import FitShape, Verdict
from placement.fit_checkpoints import Case
from placement.fit_request import FitRequest
from placement.gguf_weights import GgufWeights
from placement.llamacpp import (
    CONTEXT_PADDING,
    LlamaTask,
    Placement,
    compute_buffer_bytes,
    kv_bytes_per_layer_token,
    largest_context,
    place,
)
from placement.llamacpp_args import DEFAULT_BATCH, llama_server_args
from placement.llamacpp_speed import (
    PAGING_BYTES_PER_S,
    UNCORRECTED,
    llamacpp_setup,
    predict_llamacpp,
)
from placement.plan import GpuMemory, Rejection

_DEFAULT_SLOTS = 4  # llama-server's own default, in one unified cache
_SHORTEST_OFFLOADED_CONTEXT = 4096  # common/fit.cpp n_ctx_min: then layers go before context
_ERROR_BYTES = GIB // 2


@dataclass(frozen=True, slots=True)
class PlacedShape:
    """A shape, and the placement that it was made from."""

    shape: FitShape
    task: LlamaTask
    placement: Placement


def llamacpp_shapes(case: Case) -> Iterator[FitShape | Rejection]:
    """One result for each number of GPUs of a node: all on GPUs if possible, else offloaded."""
    for result in placed_shapes(case):
        yield result if isinstance(result, Rejection) else result.shape


def placed_shapes(case: Case) -> Iterator[PlacedShape | Rejection]:
    """The same with where everything lies."""
    refusal = _refusal(case)
    if refusal is not None or case.weights.gguf is None:
        yield _rejected(case, *(refusal or _NO_LOADER))
        return
    for num_gpus in _gpu_counts(case.request, case.gpu):
        if case.request.exact and num_gpus not in (0, case.request.total_gpus):
            continue
        yield _judge(case, case.weights.gguf, num_gpus)


_NO_LOADER = (
    "engine-has-no-loader",
    "llama.cpp loads GGUF files only (convert_hf_to_gguf.py makes one)",
)


def _refusal(case: Case) -> tuple[str, str] | None:
    """The rule that a request breaks before any size matters, and why."""
    model, request = case.model, case.request
    if case.weights.gguf is None:
        return _NO_LOADER
    if "llamacpp" not in model.loaded_by:
        return "engine-has-no-loader", f"llama.cpp cannot load {model.name}"
    others = (request.tensor_parallel_size or 1) * (request.data_parallel_size or 1)
    if others > 1 or request.expert_parallel:
        return "layer-split-only", (
            "llama.cpp is planned with whole layers on each GPU (--pipeline-parallel-size of them),"
            " not with tensor, data or expert parallelism"
        )
    wanted = request.max_model_len or 0
    if wanted > model.context:
        return "context-too-long", (
            f"max_model_len {wanted:,} is more than the model's context of {model.context:,} tokens"
        )
    if (request.pipeline_parallel_size or 1) > request.num_gpus:
        return "one-node-only", f"llama.cpp runs on one node, which has {request.num_gpus} GPUs"
    return None


def _gpu_counts(request: FitRequest, gpu: GpuType) -> tuple[int, ...]:
    if gpu.compute_capability is None:
        return (0,)
    if request.pipeline_parallel_size is not None:
        return (request.pipeline_parallel_size,)
    powers = {1 << power for power in range(request.num_gpus.bit_length())}
    return tuple(sorted({*powers, request.num_gpus}))


def _judge(case: Case, gguf: GgufWeights, num_gpus: int) -> PlacedShape | Rejection:
    request, gpu = case.request, case.gpu
    if gpu.memory_bytes is None and num_gpus:
        reason = f"the memory of {gpu.name} is unknown"
        return _rejected(case, "gpu-memory-unknown", reason, num_gpus)
    memory = gpu.memory_bytes or 0
    task, placement = _settle(_task(case, gguf), request, memory, num_gpus)
    if request.kv_cache_gib and task.context < min(request.shortest_context, case.model.context):
        return _rejected(case, "kv-cache-below-one-request", _small_cache(case, task), num_gpus)
    if placement is None:
        reason = (
            f"not even the head ({gguf.head / GIB:.2f} GiB) and the buffers fit on a GPU of "
            f"{memory / GIB:.2f} GiB"
        )
        return _rejected(case, "weights-exceed-memory", reason, num_gpus)
    if request.host_memory_gib is not None:
        short = placement.host_bytes - int(request.host_memory_gib * GIB)
        if short > 0:
            return _rejected(case, "pages-from-disk", _paging(case, placement, short), num_gpus)
    return PlacedShape(_shape(case, task, placement), task, placement)


def _settle(
    task: LlamaTask, request: FitRequest, memory: int, num_gpus: int
) -> tuple[LlamaTask, Placement | None]:
    """Choose the context, then place. As llama-fit-params: shorten the context before offloading.

    A context that was asked for stays. Otherwise the model's own, or what fits beside all weights
    on the GPUs down to a useful length; when layers must stay in host memory anyway, 4,096 tokens
    or what the load needs. Where everything fits, slots get more than one context to share.
    """
    if num_gpus == 0:
        task = _within_budget(task, request)
        return task, place(task, memory_bytes=0, num_gpus=0)
    most, share = task.context * task.num_slots, request.gpu_memory_utilization or 1.0
    longest = largest_context(
        task, memory_bytes=memory, num_gpus=num_gpus, at_most=most, share=share
    )
    shortest = max(_SHORTEST_OFFLOADED_CONTEXT, request.shortest_context)
    if longest >= task.context or (request.max_model_len is None and longest >= shortest):
        task = replace(task, context=longest)
    elif request.max_model_len is None:
        task = replace(task, context=min(task.context, _padded(shortest)))
    return task, place(task, memory_bytes=memory, num_gpus=num_gpus, share=share)


def _within_budget(task: LlamaTask, request: FitRequest) -> LlamaTask:
    """On a CPU: as many tokens as the budget for the cache holds, at most a context for each slot."""
    if request.kv_cache_gib is None:
        return task
    layers = task.architecture.num_layers
    token = layers * kv_bytes_per_layer_token(task.architecture, task.kv_cache_dtype)
    held = int(request.kv_cache_gib * GIB) // token // CONTEXT_PADDING * CONTEXT_PADDING
    return replace(task, context=min(task.context * task.num_slots, held))


def _small_cache(case: Case, task: LlamaTask) -> str:
    return (
        f"the KV cache holds {task.context:,} tokens, a request may have "
        f"{case.request.shortest_context:,}"
    )


def _task(case: Case, gguf: GgufWeights) -> LlamaTask:
    return LlamaTask(
        architecture=case.model.architecture,
        weights=gguf,
        context=case.request.max_model_len or case.model.context,
        kv_cache_dtype=case.request.kv_cache_dtype,
        num_slots=case.request.max_num_seqs or _DEFAULT_SLOTS,
    )


def _padded(tokens: int) -> int:
    return -(-tokens // CONTEXT_PADDING) * CONTEXT_PADDING


def _verdict(task: LlamaTask, placement: Placement) -> Verdict:
    """Never `tight`: llama.cpp's reserve of 1 GiB a GPU is more than this model errs by."""
    everything = placement.gpu_layers == task.architecture.num_layers
    if not placement.gpus or (everything and not placement.cpu_moe_layers):
        return "fits"  # on CPUs alone nothing is offloaded
    return "offload"


def _shape(case: Case, task: LlamaTask, placement: Placement) -> FitShape:
    weights, request = case.weights, case.request
    wanted = request.max_model_len or case.model.context
    context = min(wanted, task.context)
    used = max(1, len(placement.gpus))
    per_layer = kv_bytes_per_layer_token(task.architecture, task.kv_cache_dtype)
    layers = max(placement.layers, default=task.architecture.num_layers)
    host = _host_memory(request, task, placement)
    worst = min(placement.gpus, key=lambda each: each.headroom_bytes, default=host)
    share = request.gpu_memory_utilization or _usable_share(worst)
    verdict = _verdict(task, placement)
    setup = llamacpp_setup(weights.checkpoint, case.gpu, task, placement)
    correction = case.calibration.speed_correction(setup, UNCORRECTED.errors)
    # Replicas that share a host would share its memory.
    a_node = 1 if verdict == "offload" else max(1, request.num_gpus // used)
    return FitShape(
        engine="llamacpp",
        precision=weights.precision,
        pipeline_parallel_size=used,
        max_model_len=context,
        max_num_seqs=task.num_slots,
        max_num_batched_tokens=request.max_num_batched_tokens or DEFAULT_BATCH,
        gpu_memory_utilization=share,
        kv_cache_dtype=request.kv_cache_dtype,
        per_gpu=worst,
        kv_bytes_per_token=layers * per_layer,
        kv_cache_tokens=task.cells,
        max_concurrency=task.cells / context,
        num_layers=task.architecture.num_layers,
        gpu_layers=placement.gpu_layers,
        host_memory_bytes=placement.host_bytes,
        prediction=predict_llamacpp(task, placement, case.gpu, request, correction=correction),
        engine_args=llama_server_args(weights.checkpoint, task, placement, request),
        notes=(weights.note,) if weights.note else (),
        verdict=verdict,
        checkpoint=weights.checkpoint.source,
        checkpoint_bytes=weights.size_bytes,
        sizes_from=weights.sizes_from,
        gpus_per_replica=used,
        replicas=a_node * request.num_nodes,
        gpus=placement.gpus or (worst,),
        limit=_limit(task, placement, context, wanted),
        wanted_context=wanted,
        error_band_bytes=_ERROR_BYTES,
        cpu_moe_layers=placement.cpu_moe_layers,
    )


def _usable_share(memory: GpuMemory) -> float:
    used = memory.total_bytes - memory.headroom_bytes
    return round(used / memory.total_bytes, 4) if memory.total_bytes else 1.0


def _host_memory(request: FitRequest, task: LlamaTask, placement: Placement) -> GpuMemory:
    """A CPU's memory as if it were a GPU's."""
    total, used = int((request.host_memory_gib or 0) * GIB), placement.host_bytes
    weights = task.weights.embedding + sum(w.dense + w.experts for w in task.weights.layers)
    weights += 0 if task.weights.head_is_embedding else task.weights.head
    per_layer = kv_bytes_per_layer_token(task.architecture, task.kv_cache_dtype)
    cache = task.cells * per_layer * task.architecture.num_layers
    compute = compute_buffer_bytes(task)
    return GpuMemory(
        total_bytes=total,
        weights_bytes=weights,
        activation_bytes=compute,
        non_torch_bytes=max(0, used - weights - cache - compute),
        cuda_graph_bytes=0,
        kv_cache_bytes=cache,
        headroom_bytes=max(0, total - used),
    )


def _limit(task: LlamaTask, placement: Placement, context: int, wanted: int) -> str:
    total = task.architecture.num_layers
    host = placement.host_bytes / GIB
    if placement.gpus and placement.cpu_moe_layers:
        return (
            f"experts of {placement.cpu_moe_layers} of {total} layers in host memory, which needs "
            f"{host:.1f} GiB"
        )
    if placement.gpus and placement.gpu_layers < total:
        return (
            f"{total - placement.gpu_layers} of {total} layers in host memory, which needs "
            f"{host:.1f} GiB"
        )
    if context < wanted:
        return f"KV cache of {task.cells:,} tokens, not the model's {wanted:,}"
    return f"KV cache of {task.cells:,} tokens for {task.num_slots} slots"


def _paging(case: Case, placement: Placement, short: int) -> str:
    seconds, moe = short / PAGING_BYTES_PER_S, case.model.architecture.moe
    if moe is not None:
        seconds *= moe.num_experts_per_token / moe.num_experts
    return (
        f"{placement.host_bytes / GIB:.1f} GiB of host memory are needed and "
        f"{case.request.host_memory_gib:g} GiB are there: {short / GIB:.1f} GiB of weights would "
        f"be paged from disk again and again, {seconds:.1f} s for each token at 3 GB/s"
    )


def _rejected(case: Case, rule: str, reason: str, num_gpus: int | None = None) -> Rejection:
    shape: dict[str, str | int | bool] = {
        "model": case.model.name,
        "gpu": case.gpu.name,
        "engine": "llamacpp",
        "precision": case.weights.precision,
        "pipeline_parallel_size": num_gpus or case.request.pipeline_parallel_size or 1,
    }
    return Rejection(shape=shape, rule=rule, reason=reason)
