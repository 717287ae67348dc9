"""Whether a candidate can run at all: one function per rule, each with a name and the numbers.

A rule takes a candidate and returns why it is impossible, or None. `RULES` lists them in the order
in which they are asked; those on memory come last because they assume a sound shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from placement import adapters, balancing, format_rules, memory_rules, parallel_rules
from placement.candidate import Candidate
from placement.plan import Rejection

Rule = Callable[[Candidate], str | None]

RULES: Mapping[str, Rule] = {
    "parameters-out-of-range": format_rules.parameters_out_of_range,
    "engine-does-not-know-model": format_rules.engine_does_not_know_model,
    "engine-has-no-loader": format_rules.engine_has_no_loader,
    "tensor-parallel-exceeds-node": parallel_rules.tensor_parallel_exceeds_node,
    "tensor-parallel-across-nodes": parallel_rules.tensor_parallel_across_nodes,
    "replica-exceeds-gpus": parallel_rules.replica_exceeds_gpus,
    "ranks-not-whole-on-nodes": parallel_rules.ranks_not_whole_on_nodes,
    "mixed-gpus-in-tensor-group": parallel_rules.mixed_gpus_in_tensor_group,
    "cpu-and-gpu-in-replica": parallel_rules.cpu_and_gpu_in_replica,
    "heads-not-divisible": parallel_rules.heads_not_divisible,
    "kv-heads-not-divisible": parallel_rules.kv_heads_not_divisible,
    "feed-forward-not-divisible": parallel_rules.feed_forward_not_divisible,
    "pipeline-not-supported": parallel_rules.pipeline_not_supported,
    "more-stages-than-layers": parallel_rules.more_stages_than_layers,
    "layer-partition-mismatch": parallel_rules.layer_partition_mismatch,
    "data-parallel-needs-experts": parallel_rules.data_parallel_needs_experts,
    "copies-in-stages-need-gpus": parallel_rules.copies_in_stages_need_gpus,
    "expert-parallel-needs-experts": parallel_rules.expert_parallel_needs_experts,
    "eplb-needs-expert-parallel": parallel_rules.eplb_needs_expert_parallel,
    "eplb-needs-even-experts": parallel_rules.eplb_needs_even_experts,
    "eplb-cannot-move-experts": balancing.eplb_cannot_move_experts,
    "adapters-need-gpu-for-experts": adapters.adapters_need_gpu_for_experts,
    "adapters-need-small-vocabulary": adapters.adapters_need_small_vocabulary,
    "context-parallel-not-divisible": parallel_rules.context_parallel_not_divisible,
    "context-parallel-needs-copied-heads": parallel_rules.context_parallel_needs_copied_heads,
    "context-parallel-has-no-windows": parallel_rules.context_parallel_has_no_windows,
    "precision-needs-gpu": format_rules.precision_needs_gpu,
    "precision-needs-newer-gpu": format_rules.precision_needs_newer_gpu,
    "fp8-blocks-not-divisible": format_rules.fp8_blocks_not_divisible,
    "marlin-tiles-not-divisible": format_rules.marlin_tiles_not_divisible,
    "dtype-not-supported": format_rules.dtype_not_supported,
    "kv-cache-dtype-not-supported": format_rules.kv_cache_dtype_not_supported,
    "context-too-long": format_rules.context_too_long,
    "batch-below-num-seqs": format_rules.batch_below_num_seqs,
    "gpu-memory-unknown": memory_rules.gpu_memory_unknown,
    "weights-exceed-memory": memory_rules.weights_exceed_memory,
    "kv-cache-below-one-request": memory_rules.kv_cache_below_one_request,
}


def first_rejection(candidate: Candidate) -> Rejection | None:
    """The first rule that the candidate breaks, or None: it can run."""
    for name, rule in RULES.items():
        reason = rule(candidate)
        if reason is not None:
            return Rejection(shape=describe(candidate), rule=name, reason=reason)
    return None


def describe(candidate: Candidate) -> dict[str, str | int | bool]:
    """The candidate in the few words that a rejection needs."""
    shape: dict[str, str | int | bool] = {
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
    others = {
        "pipeline_parallel_size": candidate.pipeline_parallel_size,
        "data_parallel_size": candidate.data_parallel_size,
        "decode_context_parallel_size": candidate.decode_context_parallel_size,
        "num_nodes": candidate.num_nodes,
    }
    return {**shape, **{name: size for name, size in others.items() if size != 1}}
