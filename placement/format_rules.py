"""Rules on engine, number formats and limits: is there a loader and a kernel for these numbers?"""

from __future__ import annotations

from collections.abc import Iterator

from placement.candidate import Candidate, Device
from placement.weight_bytes import GGUF_BITS, UNQUANTISED

# Compute capability below which vLLM 0.32 has no kernel, not even a weight-only one
# (layers/quantization: fp8.py, awq_marlin.py, auto_gptq.py, compressed_tensors W4A16 for NVFP4).
_MINIMUM_CAPABILITY = {"fp8": 7.5, "awq": 7.5, "gptq": 6.0, "nvfp4": 7.5, "mxfp4": 8.0}
_FP8_CACHE_CAPABILITY = 7.5  # flashinfer.py supports_compute_capability
_MARLIN_N, _MARLIN_K = 64, 128  # marlin_utils.py GPTQ_MARLIN_MIN_THREAD_N and _K


def parameters_out_of_range(candidate: Candidate) -> str | None:
    """Sizes are at least one, a share is a share."""
    for name in (
        "num_nodes",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
    ):
        if getattr(candidate, name) < 1:
            return f"{name} is {getattr(candidate, name)}; it must be 1 or more"
    if not 0 < candidate.gpu_memory_utilization <= 1:
        share = candidate.gpu_memory_utilization
        return f"gpu_memory_utilization is {share:g}; it must be above 0 and at most 1"
    ranks = candidate.tensor_parallel_size * candidate.pipeline_parallel_size
    if candidate.rank_devices and len(candidate.rank_devices) != ranks:
        return f"{len(candidate.rank_devices)} devices are named for {ranks} ranks"
    return None


def engine_does_not_know_model(candidate: Candidate) -> str | None:
    """The engine's release that we plan for has no class for this architecture."""
    model, engine = candidate.model, candidate.engine
    if engine == "sim" or engine in model.loaded_by:
        return None
    others = f"; {' and '.join(model.loaded_by)} can" if model.loaded_by else ""
    return f"{engine} (vLLM 0.32, llama.cpp of October 2026) does not load {model.name}{others}"


def engine_has_no_loader(candidate: Candidate) -> str | None:
    """VLLM 0.32 lists no `gguf` among its quantisation methods (quantization/__init__.py)."""
    precision = candidate.checkpoint.precision
    is_gguf = candidate.checkpoint.format == "gguf" or precision in GGUF_BITS
    if candidate.engine == "llamacpp":
        return None if is_gguf else f"llama.cpp loads GGUF only, not {precision} safetensors"
    if not is_gguf:
        return None
    return f"vLLM 0.32 cannot load GGUF ({precision}); llama.cpp can"


def precision_needs_gpu(candidate: Candidate) -> str | None:
    """On a CPU only unquantised weights run."""
    precision = candidate.checkpoint.precision
    if candidate.engine == "llamacpp" or precision in UNQUANTISED or not candidate.device.is_cpu:
        return None
    return f"{precision} weights need a GPU; on a CPU only fp32, bf16 and fp16 run"


def precision_needs_newer_gpu(candidate: Candidate) -> str | None:
    """Kernels exist from some compute capability on."""
    precision = candidate.checkpoint.precision
    minimum = _MINIMUM_CAPABILITY.get(precision)
    for device in devices_of(candidate):
        capability, name = device.gpu.compute_capability, device.gpu.name
        if capability is not None and minimum is not None and capability < minimum:
            return f"{precision} needs compute capability {minimum}, {name} has {capability}"
    return None


def fp8_blocks_not_divisible(candidate: Candidate) -> str | None:
    """Weights that share a scale must stay together (fp8_utils.py validate_fp8_block_shape)."""
    block, ranks = candidate.checkpoint.quantisation_block, candidate.tensor_parallel_size
    if block is None or ranks == 1:
        return None
    for name, size in _cut_sizes(candidate):
        if size // ranks % block:
            return (
                f"{name} {size} over {ranks} ranks is {size // ranks}: no multiple of the "
                f"{block} weights that share an FP8 scale"
            )
    return None


def marlin_tiles_not_divisible(candidate: Candidate) -> str | None:
    """Marlin's tiles for 4-bit integers: N % 64, K % 128 (marlin_utils.py). FP8 and FP4 are padded."""
    if candidate.checkpoint.precision not in ("awq", "gptq"):
        return None
    ranks = candidate.tensor_parallel_size
    for name, size in _cut_sizes(candidate):  # a column of one matrix and a row of the next
        if size // ranks % _MARLIN_K:
            return (
                f"{name} {size} over {ranks} ranks is {size // ranks}: Marlin needs multiples of "
                f"{_MARLIN_N} columns and {_MARLIN_K} rows"
            )
    return None


def dtype_not_supported(candidate: Candidate) -> str | None:
    """BF16 arithmetic came with compute capability 8.0; quantised kernels have no float32."""
    precision, dtype = candidate.checkpoint.precision, candidate.dtype
    for device in devices_of(candidate):
        capability, name = device.gpu.compute_capability, device.gpu.name
        if dtype == "bfloat16" and capability is not None and capability < 8.0:
            return f"bfloat16 needs compute capability 8.0, {name} has {capability}"
    if dtype == "float32" and precision not in UNQUANTISED:
        return f"{precision} kernels compute in 16 bits, not in float32"
    return None


def kv_cache_dtype_not_supported(candidate: Candidate) -> str | None:
    """No attention kernel below capability 7.5 reads an FP8 cache."""
    if candidate.kv_cache_dtype != "fp8":
        return None
    for device in devices_of(candidate):
        capability, name = device.gpu.compute_capability, device.gpu.name
        if capability is not None and capability < _FP8_CACHE_CAPABILITY:
            return (
                f"an fp8 KV cache needs compute capability {_FP8_CACHE_CAPABILITY}, {name} has "
                f"{capability}"
            )
    return None


def context_too_long(candidate: Candidate) -> str | None:
    """Positions beyond the trained context give nonsense."""
    wanted, context = candidate.max_model_len, candidate.model.context
    if wanted <= context:
        return None
    return f"max_model_len {wanted:,} is more than the model's context of {context:,} tokens"


def batch_below_num_seqs(candidate: Candidate) -> str | None:
    """A step must have room for a token of each request (SchedulerConfig.verify_max_model_len)."""
    tokens, seqs = candidate.max_num_batched_tokens, candidate.max_num_seqs
    if tokens >= seqs:
        return None
    return f"max_num_batched_tokens {tokens} is less than max_num_seqs {seqs}"


def devices_of(candidate: Candidate) -> tuple[Device, ...]:
    """Every device that the candidate runs on, each kind at least once."""
    return candidate.rank_devices or (candidate.device,)


def _cut_sizes(candidate: Candidate) -> Iterator[tuple[str, int]]:
    """Inner sizes along which tensor parallelism cuts the quantised matrices."""
    architecture = candidate.architecture
    width = architecture.head_dim
    if architecture.mla is not None:
        width = architecture.mla.v_head_dim
    yield "attention width", architecture.num_heads * width
    moe = architecture.moe
    if architecture.intermediate_size is not None and (moe is None or moe.num_dense_layers):
        yield "intermediate_size", architecture.intermediate_size
    if moe is not None and moe.num_shared_experts:
        yield "shared experts", moe.num_shared_experts * moe.expert_intermediate_size
    if moe is not None and not candidate.expert_parallel:
        yield "expert_intermediate_size", moe.expert_intermediate_size
