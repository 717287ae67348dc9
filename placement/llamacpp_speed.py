"""How fast llama.cpp is: weights and cache are read once for each token, wherever they are."""

from __future__ import annotations

import shlex

from placement.calibration import SpeedCorrection
from placement.catalogue import Checkpoint, GpuType
from placement.costs import NO_MESSAGE, DraftCost, Efficiency, ReplicaSpeed
from placement.efficiency import bandwidth_beside_hopper
from placement.fit_request import FitRequest
from placement.fitted import LLAMACPP, LLAMACPP_ERROR, UNKNOWN, Errors, LlamaConstants
from placement.llamacpp import LlamaTask, Placement, kv_bytes_per_layer_token
from placement.parameters import count_parameters
from placement.plan import Prediction
from placement.setups import SpeedSetup

# DeepSeek-V3 Q4_K_M with 54 of 61 layers in host memory: 4.65 tokens/s (llama.cpp issue 10981),
# which are 90 GB/s; its prompts at 18.4 tokens/s are 1.4 TFLOPS.
HOST_BYTES_PER_S = 90e9
HOST_FLOPS = 1.4e12
UNCORRECTED = SpeedCorrection(Errors(tpot=LLAMACPP_ERROR, ttft=UNKNOWN.ttft))
PAGING_BYTES_PER_S = 3e9  # a fast NVMe disk
_PROMPT_SHARE = 0.35  # of the FLOPS, on quantised weights


def predict_llamacpp(
    task: LlamaTask,
    placement: Placement,
    gpu: GpuType,
    request: FitRequest,
    *,
    constants: LlamaConstants = LLAMACPP,
    correction: SpeedCorrection = UNCORRECTED,
) -> Prediction:
    """Means for the request's load. GPUs work one after the other: layers are not shared.

    decode step = bytes read on GPUs / their share of the bandwidth + bytes read in host memory /
    its bandwidth (90 GB/s unless told) + a fixed time a layer (`fitted.py`); of experts as many are
    read as the requests use: E x (1 - (1 - k/E)^requests).
    """
    slots = min(request.concurrency or 1, task.num_slots)
    gpu_bytes, host_bytes = _bytes_read(task, placement, slots)
    tokens = request.input_tokens + request.output_tokens / 2
    kv = slots * tokens * kv_bytes_per_layer_token(task.architecture, task.kv_cache_dtype)
    on_gpu = placement.gpu_layers / task.architecture.num_layers
    layers = task.architecture.num_layers
    gpu_s = (gpu_bytes + kv * layers * on_gpu) / _gpu_bytes_per_s(gpu, constants)
    host = HOST_BYTES_PER_S
    if request.host_bandwidth_gb_s is not None:
        host = request.host_bandwidth_gb_s * 1e9
    host_s = (host_bytes + kv * layers * (1 - on_gpu)) / host
    step = gpu_s + host_s + layers * constants.layer_s
    new = request.input_tokens * (1 - request.prefix_hit)
    ttft = new * _prompt_s_per_token(task, placement, gpu) + step
    tpot = (step + (slots - 1) / request.output_tokens * ttft) * correction.tpot
    ttft *= correction.ttft
    duration = ttft + (request.output_tokens - 1) * tpot
    return Prediction(
        ttft_s=ttft,
        tpot_ms=tpot * 1000,
        output_tokens_per_s=slots * request.output_tokens / duration,
        ttft_error=correction.errors.ttft,
        tpot_error=correction.errors.tpot,
    )


def llamacpp_replica_speed(
    task: LlamaTask,
    placement: Placement,
    gpu: GpuType,
    *,
    max_num_batched_tokens: int,
    constants: LlamaConstants = LLAMACPP,
    correction: SpeedCorrection = UNCORRECTED,
) -> ReplicaSpeed:
    """The same costs in the form that capacity, autoscaler and router work with.

    One memory stands for two: bytes on GPUs count as the bytes that host memory would read in the
    same time, a layer's fixed time as one kernel. Windows save nothing, and the GPUs of a replica
    take turns, so they count as one rank.
    """
    as_host = HOST_BYTES_PER_S / _gpu_bytes_per_s(gpu, constants)
    architecture = task.architecture.model_copy(update={"sliding_window": None})
    layers = architecture.num_layers
    dense_gpu, dense_host = _bytes_read(task, placement, 0)
    every_gpu, every_host = _bytes_read(task, placement, None)
    on_gpu = placement.gpu_layers / layers
    kv = layers * kv_bytes_per_layer_token(architecture, task.kv_cache_dtype)
    always = dense_host + dense_gpu * as_host
    prompt = _prompt_s_per_token(task, placement, gpu) * HOST_FLOPS
    head = task.weights.head * (as_host if placement.head_on_gpu else 1.0)
    return ReplicaSpeed(
        architecture=architecture,
        efficiency=Efficiency(
            bandwidth=1.0,
            flops=1.0,
            step_s=0.0,
            kernel_s=constants.layer_s,
            errors=correction.errors,
        ),
        bandwidth_bytes_per_s=HOST_BYTES_PER_S,
        flops=HOST_FLOPS,
        flops_16_bit=HOST_FLOPS,
        always_read_bytes=always,
        expert_bytes=every_host - dense_host + (every_gpu - dense_gpu) * as_host,
        flops_per_token=prompt,
        prefill_flops_per_token=prompt,
        expert_flops_per_token=0.0,
        attention_flops=0.0,
        kv_bytes_per_token=round(kv * (1 - on_gpu + on_gpu * as_host)),
        kernels=layers,
        all_reduces=0,
        all_reduce=NO_MESSAGE,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=task.num_slots,
        kv_cache_tokens=task.cells,
        draft=DraftCost((always - head) / layers + head, kernels=1, messages=0),
        ttft_factor=correction.ttft,
        tpot_factor=correction.tpot,
    )


def llamacpp_setup(
    checkpoint: Checkpoint,
    gpu: GpuType,
    task: LlamaTask,
    placement: Placement,
    *,
    threads: int | None = None,
    engine_args: tuple[str, ...] = (),
) -> SpeedSetup:
    """What has to be alike for another llama.cpp's speed to be that of this one."""
    return SpeedSetup(
        checkpoint=checkpoint.source,
        precision=checkpoint.precision,
        gpu=gpu.name,
        engine="llamacpp",
        dtype="auto",
        kv_cache_dtype=task.kv_cache_dtype,
        tensor_parallel_size=1,
        pipeline_parallel_size=max(1, len(placement.gpus)),
        data_parallel_size=1,
        expert_parallel=False,
        gpu_layers=placement.gpu_layers,
        cpu_moe_layers=placement.cpu_moe_layers,
        threads=threads,
        engine_args=shlex.join(engine_args),
    )


def _gpu_bytes_per_s(gpu: GpuType, constants: LlamaConstants) -> float:
    """What reading weights and cache on a GPU reaches."""
    share = constants.gpu_bandwidth * bandwidth_beside_hopper(gpu)
    return gpu.memory_bandwidth_bytes_per_s * share


def _bytes_read(task: LlamaTask, placement: Placement, slots: int | None) -> tuple[float, float]:
    """On GPUs and in host memory, for a token of each slot; None: with all experts."""
    moe, weights = task.architecture.moe, task.weights
    used = 1.0
    if moe is not None and slots is not None:
        used = 1 - (1 - moe.num_experts_per_token / moe.num_experts) ** slots
    first = task.architecture.num_layers - placement.gpu_layers
    gpu, host = 0.0, 0.0
    for index, layer in enumerate(weights.layers):
        on_gpu = index >= first
        experts_on_gpu = on_gpu and index >= placement.cpu_moe_layers
        gpu += layer.dense * on_gpu + layer.experts * used * experts_on_gpu
        host += layer.dense * (not on_gpu) + layer.experts * used * (not experts_on_gpu)
    if placement.head_on_gpu:
        return gpu + weights.head, host
    return gpu, host + weights.head


def _prompt_s_per_token(task: LlamaTask, placement: Placement, gpu: GpuType) -> float:
    counted = count_parameters(task.architecture)
    working = counted.language - counted.embedding - counted.idle_experts
    total = sum(layer.dense + layer.experts for layer in task.weights.layers) or 1
    at_home = _host_share(task, placement, total)
    return 2 * working * (at_home / HOST_FLOPS + (1 - at_home) / (gpu.bf16_flops * _PROMPT_SHARE))


def _host_share(task: LlamaTask, placement: Placement, total: int) -> float:
    first = task.architecture.num_layers - placement.gpu_layers
    held = sum(layer.dense for layer in task.weights.layers[:first])
    held += sum(
        layer.experts
        for index, layer in enumerate(task.weights.layers)
        if index < max(first, placement.cpu_moe_layers)
    )
    return held / total
