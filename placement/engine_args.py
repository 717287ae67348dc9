"""The vLLM flags of a candidate, all explicit: a planner's numbers must not meet other defaults."""

from __future__ import annotations

from placement.balancing import balance_args
from placement.candidate import Candidate
from placement.expert_exchange import exchange_args


def engine_args(candidate: Candidate, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Flags for `python -m vllm.entrypoints.openai.api_server`, beginning with `--model SOURCE`.

    After the planned sizes come the checkpoint's and the model's flags from the catalogue, then
    `extra`, the fleet's, so that on a conflict the operator's flag wins. On a CPU the KV cache is given in
    bytes (VLLM_CPU_KVCACHE_SPACE knows only whole GiB) and there is no memory share. Of several nodes
    each gets the same flags, and `--node-rank` and where to meet the others beside.
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
    for flag, size in (
        ("--pipeline-parallel-size", candidate.pipeline_parallel_size),
        ("--decode-context-parallel-size", candidate.decode_context_parallel_size),
    ):
        if size > 1:
            args += [flag, str(size)]
    if candidate.num_nodes > 1:
        args += ["--nnodes", str(candidate.num_nodes)]
    args += exchange_args(candidate)
    if candidate.expert_parallel:
        args.append("--enable-expert-parallel")
    args += balance_args(candidate)
    if candidate.lora is not None:
        args += ["--enable-lora", "--max-loras", str(candidate.lora.max_loras)]
        args += ["--max-lora-rank", str(candidate.lora.max_lora_rank)]
        args += [
            "--max-cpu-loras",
            str(max(candidate.lora.max_cpu_loras, candidate.lora.max_loras)),
        ]
    if candidate.language_model_only:
        args.append("--language-model-only")
    args += ["--dtype", candidate.dtype, "--kv-cache-dtype", candidate.kv_cache_dtype]
    return (*args, *candidate.checkpoint.engine_args, *candidate.model.engine_args, *extra)


def engine_environment(candidate: Candidate) -> dict[str, str]:
    """Environment variables that the candidate's process needs beside its flags."""
    if not candidate.layer_partition:
        return {}
    return {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, candidate.layer_partition))}
