"""Flags of the engines that the plan decides: a fleet has keys for them instead."""

from __future__ import annotations

# Flags of the engines that the planner writes, and the key of the fleet that sets each.
_PLANNED_FLAGS = {
    "--model": "model",
    "--tensor-parallel-size": "tensor_parallel_size",
    "-tp": "tensor_parallel_size",
    "--nnodes": "nodes_per_replica",
    "--enable-expert-parallel": "expert_parallel",
    "--enable-eplb": "eplb",
    "--eplb-config": "eplb",
    "--enable-lora": "lora",
    "--max-loras": "lora.max_loras",
    "--max-lora-rank": "lora.max_lora_rank",
    "--max-cpu-loras": "lora.max_cpu_loras",
    "--lora-modules": "adapters",
    "--max-model-len": "max_model_len",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--dtype": "dtype",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--kv-transfer-config": "disaggregate",
    "--ctx-size": "max_model_len",
    "--parallel": "max_num_seqs",
    "--batch-size": "max_num_batched_tokens",
    "--n-gpu-layers": "gpu_memory_utilization",
    "--n-cpu-moe": "gpu_memory_utilization",
    "--tensor-split": "gpu_memory_utilization",
    "--cache-type-k": "kv_cache_dtype",
    "--cache-type-v": "kv_cache_dtype",
}
_DATA_PARALLEL_FLAGS = ("--data-parallel-", "-dp")  # size, local size, ranks, address, ...


def planned_by(flag: str) -> str | None:
    """The key of the fleet that sets what this flag of an engine would; None: the flag is free."""
    name = flag.split("=", maxsplit=1)[0].replace("_", "-")
    return (
        "data_parallel_size" if name.startswith(_DATA_PARALLEL_FLAGS) else _PLANNED_FLAGS.get(name)
    )
