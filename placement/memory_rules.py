"""Rules on memory: do weights, overheads and one request fit?"""

from __future__ import annotations

from placement.candidate import GIB, Candidate
from placement.format_rules import devices_of
from placement.kv_cache import longest_context
from placement.memory import kv_layout, memory_use


def gpu_memory_unknown(candidate: Candidate) -> str | None:
    """Nothing can be planned without a size."""
    for device in devices_of(candidate):
        if device.memory_bytes is None:
            return f"the memory of {device.gpu.name} is unknown: set the pool's memory_gib_per_gpu"
    return None


def weights_exceed_memory(candidate: Candidate) -> str | None:
    """Weights and overheads leave nothing, or on a CPU less than the KV cache's fixed budget."""
    use = memory_use(candidate)
    if use.missing_bytes == 0 and use.per_gpu.kv_cache_bytes > 0:
        return None
    memory = use.per_gpu
    weights, total = memory.weights_bytes / GIB, memory.total_bytes / GIB
    overheads = memory.adapter_bytes + memory.activation_bytes
    overheads += memory.non_torch_bytes + memory.cuda_graph_bytes
    parts = f"{weights:.2f} GiB of weights and {overheads / GIB:.2f} GiB of overheads"
    if candidate.device.is_cpu:
        parts += f" and {(candidate.device.kv_cache_budget_bytes or 0) / GIB:.2f} GiB of KV cache"
        allowed = f"{total:.2f} GiB"
    else:
        share = candidate.gpu_memory_utilization
        allowed = f"{total * share:.2f} GiB ({share:.0%} of {total:.2f})"
    missing = use.missing_bytes / GIB
    return f"{parts} per rank{_where(candidate)} exceed {allowed} by {missing:.2f} GiB"


def kv_cache_below_one_request(candidate: Candidate) -> str | None:
    """VLLM refuses to start when one request of max_model_len does not fit into the cache."""
    use = memory_use(candidate)
    if use.kv.holds_one_request:
        return None
    available = use.per_gpu.kv_cache_bytes
    layout = kv_layout(candidate, use.stages[use.worst_stage].stage)
    fits = longest_context(layout, available_bytes=available, at_most=candidate.max_model_len)
    block_bytes = use.kv.block_size * use.kv.bytes_per_token
    needed = (use.kv.blocks_per_request + 1) * block_bytes
    return (
        f"one request of max_model_len {candidate.max_model_len:,} needs {needed / GIB:.2f} GiB of "
        f"KV cache per rank{_where(candidate)}, there are {available / GIB:.2f} GiB: enough for "
        f"{fits:,} tokens"
    )


def _where(candidate: Candidate) -> str:
    stages = candidate.pipeline_parallel_size
    if stages == 1:
        return ""
    return f" of stage {memory_use(candidate).worst_stage + 1} of {stages}"
