"""Whether a candidate can run at all: one function per rule, each with a name and the numbers.

A rule takes a candidate and returns why it is impossible, or None. `RULES` lists them in the order
in which they are asked; those on memory come last because they assume a sound shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from placement.candidate import GIB, Candidate
from placement.kv_cache import longest_context
from placement.memory import kv_layout, memory_use
from placement.plan import Rejection

Rule = Callable[[Candidate], str | None]

GGUF_PRECISIONS = frozenset({"q2_k", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0"})
FULL_PRECISIONS = frozenset({"fp32", "bf16", "fp16"})
# Compute capability below which vLLM 0.32 has no kernel, not even a weight-only one
# (layers/quantization: fp8.py, awq_marlin.py, auto_gptq.py, compressed_tensors W4A16 for NVFP4).
_MINIMUM_CAPABILITY = {"fp8": 7.5, "awq": 7.5, "gptq": 6.0, "nvfp4": 7.5}


def first_rejection(candidate: Candidate) -> Rejection | None:
    """The first rule that the candidate breaks, or None: it can run."""
    for name, rule in RULES.items():
        reason = rule(candidate)
        if reason is not None:
            return Rejection(shape=describe(candidate), rule=name, reason=reason)
    return None


def describe(candidate: Candidate) -> dict[str, str | int | bool]:
    """The candidate in the few words that a rejection needs."""
    return {
        "model": candidate.model.name,
        "gpu": candidate.device.gpu.name,
        "engine": candidate.engine,
        "precision": candidate.checkpoint.precision,
        "tensor_parallel_size": candidate.tensor_parallel_size,
        "expert_parallel": candidate.expert_parallel,
        "max_model_len": candidate.max_model_len,
        "max_num_seqs": candidate.max_num_seqs,
        "max_num_batched_tokens": candidate.max_num_batched_tokens,
    }


def engine_has_no_loader(candidate: Candidate) -> str | None:
    """VLLM 0.32 lists no `gguf` among its quantisation methods (quantization/__init__.py)."""
    precision = candidate.checkpoint.precision
    if candidate.checkpoint.format != "gguf" and precision not in GGUF_PRECISIONS:
        return None
    return f"vLLM 0.32 cannot load GGUF ({precision}); llama.cpp can"


def tensor_parallel_exceeds_node(candidate: Candidate) -> str | None:
    """Tensor parallelism needs the fast link inside a node."""
    ranks, gpus = candidate.tensor_parallel_size, candidate.device.gpus_per_node
    if ranks <= gpus:
        return None
    return f"tensor_parallel_size {ranks} needs {ranks} GPUs in one node, a node has {gpus}"


def heads_not_divisible(candidate: Candidate) -> str | None:
    """Each rank computes as many attention heads (config/model.py verify_with_parallel_config)."""
    heads, ranks = candidate.architecture.num_heads, candidate.tensor_parallel_size
    if heads % ranks == 0:
        return None
    return f"{heads} attention heads cannot be split over {ranks} ranks"


def kv_heads_not_divisible(candidate: Candidate) -> str | None:
    """K/V heads are split evenly, or copied evenly (QKVParallelLinear). MLA has one latent."""
    heads, ranks = candidate.architecture.num_kv_heads, candidate.tensor_parallel_size
    even = heads % ranks == 0 or ranks % heads == 0
    if candidate.architecture.mla is not None or even:
        return None
    return f"{heads} K/V heads can be neither split nor copied evenly over {ranks} ranks"


def feed_forward_not_divisible(candidate: Candidate) -> str | None:
    """Matrices are cut along the intermediate size, unless experts stay whole."""
    architecture, ranks = candidate.architecture, candidate.tensor_parallel_size
    sizes = {"intermediate_size": architecture.intermediate_size}
    if architecture.moe is not None and not candidate.expert_parallel:
        sizes["expert_intermediate_size"] = architecture.moe.expert_intermediate_size
    for name, size in sizes.items():
        if size is not None and size % ranks:
            return f"{name} {size} cannot be split over {ranks} ranks"
    return None


def expert_parallel_needs_experts(candidate: Candidate) -> str | None:
    """Only a mixture of experts has experts to spread, and each rank needs one."""
    if not candidate.expert_parallel:
        return None
    moe, ranks = candidate.architecture.moe, candidate.tensor_parallel_size
    if moe is None:
        return f"{candidate.model.name} is dense: there are no experts to spread"
    if moe.num_experts < ranks:
        return f"{moe.num_experts} experts are too few for {ranks} ranks"
    return None


def precision_needs_gpu(candidate: Candidate) -> str | None:
    """On a CPU only unquantised weights run."""
    precision = candidate.checkpoint.precision
    if not candidate.device.is_cpu or precision in FULL_PRECISIONS:
        return None
    return f"{precision} weights need a GPU; on a CPU only fp32, bf16 and fp16 run"


def precision_needs_newer_gpu(candidate: Candidate) -> str | None:
    """Kernels exist from some compute capability on."""
    capability = candidate.device.gpu.compute_capability
    precision, name = candidate.checkpoint.precision, candidate.device.gpu.name
    minimum = _MINIMUM_CAPABILITY.get(precision)
    if capability is None or minimum is None or capability >= minimum:
        return None
    return f"{precision} needs compute capability {minimum}, {name} has {capability}"


def dtype_not_supported(candidate: Candidate) -> str | None:
    """BF16 arithmetic came with compute capability 8.0; quantised kernels have no float32."""
    capability, dtype = candidate.device.gpu.compute_capability, candidate.dtype
    if dtype == "bfloat16" and capability is not None and capability < 8.0:
        return (
            f"bfloat16 needs compute capability 8.0, {candidate.device.gpu.name} has {capability}"
        )
    if dtype == "float32" and candidate.checkpoint.precision not in FULL_PRECISIONS:
        return f"{candidate.checkpoint.precision} kernels compute in 16 bits, not in float32"
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


def gpu_memory_unknown(candidate: Candidate) -> str | None:
    """Nothing can be planned without a size."""
    if candidate.device.memory_bytes is not None:
        return None
    return (
        f"the memory of {candidate.device.gpu.name} is unknown: set the pool's memory_gib_per_gpu"
    )


def weights_exceed_memory(candidate: Candidate) -> str | None:
    """Weights and overheads leave nothing, or on a CPU less than the KV cache's fixed budget."""
    use = memory_use(candidate)
    if use.missing_bytes == 0 and use.per_gpu.kv_cache_bytes > 0:
        return None
    memory = use.per_gpu
    weights, total = memory.weights_bytes / GIB, memory.total_bytes / GIB
    overheads = memory.activation_bytes + memory.non_torch_bytes + memory.cuda_graph_bytes
    parts = f"{weights:.2f} GiB of weights and {overheads / GIB:.2f} GiB of overheads"
    if candidate.device.is_cpu:
        parts += f" and {(candidate.device.kv_cache_budget_bytes or 0) / GIB:.2f} GiB of KV cache"
        allowed = f"{total:.2f} GiB"
    else:
        share = candidate.gpu_memory_utilization
        allowed = f"{total * share:.2f} GiB ({share:.0%} of {total:.2f})"
    missing = use.missing_bytes / GIB
    return f"{parts} per rank exceed {allowed} by {missing:.2f} GiB"


def kv_cache_below_one_request(candidate: Candidate) -> str | None:
    """VLLM refuses to start when one request of max_model_len does not fit into the cache."""
    use = memory_use(candidate)
    if use.kv.holds_one_request:
        return None
    available = use.per_gpu.kv_cache_bytes
    fits = longest_context(
        kv_layout(candidate), available_bytes=available, at_most=candidate.max_model_len
    )
    block_bytes = use.kv.block_size * use.kv.bytes_per_token
    needed = (use.kv.blocks_per_request + 1) * block_bytes
    return (
        f"one request of max_model_len {candidate.max_model_len:,} needs {needed / GIB:.2f} GiB of "
        f"KV cache per rank, there are {available / GIB:.2f} GiB: enough for {fits:,} tokens"
    )


RULES: Mapping[str, Rule] = {
    "engine-has-no-loader": engine_has_no_loader,
    "tensor-parallel-exceeds-node": tensor_parallel_exceeds_node,
    "heads-not-divisible": heads_not_divisible,
    "kv-heads-not-divisible": kv_heads_not_divisible,
    "feed-forward-not-divisible": feed_forward_not_divisible,
    "expert-parallel-needs-experts": expert_parallel_needs_experts,
    "precision-needs-gpu": precision_needs_gpu,
    "precision-needs-newer-gpu": precision_needs_newer_gpu,
    "dtype-not-supported": dtype_not_supported,
    "context-too-long": context_too_long,
    "batch-below-num-seqs": batch_below_num_seqs,
    "gpu-memory-unknown": gpu_memory_unknown,
    "weights-exceed-memory": weights_exceed_memory,
    "kv-cache-below-one-request": kv_cache_below_one_request,
}
