"""The vLLM flags of a candidate, all explicit: a planner's numbers must not meet other defaults."""

from __future__ import annotations

from placement.candidate import Candidate


def engine_args(candidate: Candidate, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Flags for `python -m vllm.entrypoints.openai.api_server`, beginning with `--model SOURCE`.

    After the planned sizes come the model's own flags from the catalogue, then `extra`, the
    fleet's, so that on a conflict the operator's flag wins. On a CPU the KV cache is given in
    bytes (VLLM_CPU_KVCACHE_SPACE knows only whole GiB) and there is no memory share.
    """
    args = [
        *("--model", candidate.checkpoint.source),
        *("--tensor-parallel-size", str(candidate.tensor_parallel_size)),
        *("--max-model-len", str(candidate.max_model_len)),
        *("--max-num-seqs", str(candidate.max_num_seqs)),
        *("--max-num-batched-tokens", str(candidate.max_num_batched_tokens)),
    ]
    if candidate.device.is_cpu:
        args += ["--kv-cache-memory-bytes", str(candidate.device.kv_cache_budget_bytes or 0)]
    else:
        args += ["--gpu-memory-utilization", f"{candidate.gpu_memory_utilization:g}"]
    if candidate.expert_parallel:
        args.append("--enable-expert-parallel")
    args += ["--dtype", candidate.dtype, "--kv-cache-dtype", candidate.kv_cache_dtype]
    return (*args, *candidate.model.engine_args, *extra)
