"""Where a rank's memory goes: weights, activations, KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.architecture import Architecture
from placement.candidate import GIB, Candidate
from placement.catalogue import Checkpoint, Precision
from placement.kv_cache import KvCache, KvLayout, kv_block_size, kv_bytes_per_token, kv_cache
from placement.parameters import Parameters, count_parameters, rank_parameters
from placement.plan import GpuMemory

# Bytes per weight of the llama.cpp formats: tools/quantize/README.md, bits of a whole file.
_GGUF_BITS = {
    "q2_k": 3.1593, "iq4_xs": 4.4597, "q4_k_s": 4.6672, "q4_k_m": 4.8944,
    "q5_k_m": 5.7036, "q6_k": 6.5633, "q8_0": 8.5008,
}  # fmt: skip
_UNQUANTISED = ("fp32", "bf16", "fp16")
_NON_TORCH_BYTES = (int(0.13 * GIB), int(0.55 * GIB))  # one rank, more ranks (NCCL)
_CUDA_GRAPH_BYTES = GIB // 4  # logs show 0.1 to 1.0 GiB
_SAMPLER_BYTES = 38.7  # per request slot and vocabulary entry, from seven H100 logs
_MLA_WORKSPACE_TOKENS = 64 * 1024
_PROCESS_BYTES = int(1.8 * GIB)  # a vLLM worker on a CPU before it loads anything


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """One rank's memory, and the cache that fits into what is left."""

    per_gpu: GpuMemory
    kv: KvCache
    missing_bytes: int  # by how much weights and overheads exceed the budget; 0: they fit


def checkpoint_bytes(architecture: Architecture, checkpoint: Checkpoint) -> int:
    """Size of a checkpoint's weights: as published, or by arithmetic."""
    computed = _stored_bytes(count_parameters(architecture), checkpoint.precision)
    return checkpoint.size_bytes or int(computed)


def weights_bytes(candidate: Candidate) -> int:
    """Weights on one rank (the largest), with the copies that MLA makes of kv_b on GPUs.

    Unquantised weights take the dtype's bytes. Quantised ones follow `_bytes_per_weight`, scaled
    to the checkpoint's published size where it is known. Absorbed copies W_UK and W_UV in 16 bit:
    heads x kv_lora x (nope + v) per layer (mla_attention.py process_weights_after_loading).
    """
    architecture, checkpoint = candidate.architecture, candidate.checkpoint
    rank = rank_parameters(
        architecture,
        tensor_parallel_size=candidate.tensor_parallel_size,
        expert_parallel=candidate.expert_parallel,
    )
    if checkpoint.precision in _UNQUANTISED:
        weights = float(rank.total * candidate.element_bytes)
    else:
        weights = _stored_bytes(rank, checkpoint.precision)
        if checkpoint.size_bytes is not None:
            whole = _stored_bytes(count_parameters(architecture), checkpoint.precision)
            weights *= checkpoint.size_bytes / whole
    copies = 0
    mla = architecture.mla
    if mla is not None and not candidate.device.is_cpu:
        heads = architecture.num_heads // candidate.tensor_parallel_size
        width = mla.qk_nope_head_dim + mla.v_head_dim
        copies = architecture.num_layers * heads * mla.kv_lora_rank * width * 2
    return int(weights) + copies


def activation_bytes(candidate: Candidate) -> int:
    """Peak of one rank beside weights and cache, as vLLM's profile run finds it.

    The larger of the forward pass over max_num_batched_tokens (residual stream and the widest
    feed-forward) and the sampler over max_num_seqs rows while the hidden states are kept: 38.7
    bytes x max_num_seqs x vocabulary, whatever the model's size. MLA adds its chunked-prefill
    workspace (mla_attention.py determine_chunked_prefill_workspace_size).
    """
    architecture, ranks = candidate.architecture, candidate.tensor_parallel_size
    moe, width = architecture.moe, architecture.intermediate_size or 0
    if moe is not None:
        width = max(width, moe.num_experts_per_token * moe.expert_intermediate_size)
    hidden = 2 * architecture.hidden_size * candidate.max_num_batched_tokens
    wide = 2 * width // ranks * candidate.max_num_batched_tokens
    sampler = int(_SAMPLER_BYTES * candidate.max_num_seqs * architecture.vocab_size)
    peak = hidden * candidate.element_bytes + max(wide * candidate.element_bytes, sampler)
    mla = architecture.mla
    if mla is None:
        return peak
    slots = 4 * candidate.max_num_seqs * kv_layout(candidate).block_size
    tokens = min(max(8 * candidate.max_model_len, slots), _MLA_WORKSPACE_TOKENS)
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    heads = architecture.num_heads // ranks
    expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return peak + tokens * (latent + expanded) * candidate.element_bytes


def kv_layout(candidate: Candidate) -> KvLayout:
    """How the candidate's KV cache is cut.

    A sliding window also keeps the tokens of steps in flight: one step's on a CPU, two on GPUs,
    where scheduling overlaps (config/vllm.py max_in_flight_tokens, max_concurrent_batches).
    """
    architecture, on_cpu = candidate.architecture, candidate.device.is_cpu
    return KvLayout(
        bytes_per_token=kv_bytes_per_token(
            architecture,
            tensor_parallel_size=candidate.tensor_parallel_size,
            element_bytes=candidate.kv_element_bytes,
        ),
        block_size=kv_block_size(
            architecture,
            candidate.device.gpu,
            kv_element_bytes=candidate.kv_element_bytes,
            amx=candidate.device.amx,
        ),
        sliding_window=architecture.sliding_window,
        max_in_flight_tokens=candidate.max_num_batched_tokens * (1 if on_cpu else 2),
    )


def memory_use(candidate: Candidate) -> MemoryUse:
    """Split one rank's memory.

    On a GPU vLLM takes ceil(total x gpu_memory_utilization) and gives the KV cache what weights,
    non-torch memory, activations and CUDA graphs leave (v1/worker/gpu_worker.py
    determine_available_memory). On a CPU the cache is a fixed budget (cpu_worker.py), and it must
    fit beside the weights and the process.
    """
    weights = weights_bytes(candidate)
    total = candidate.device.memory_bytes or 0
    if candidate.device.is_cpu:
        wanted = candidate.device.kv_cache_budget_bytes or 0
        activation, graphs, non_torch = 0, 0, _PROCESS_BYTES
        left = total - weights - non_torch
        missing = max(0, wanted - left)
        available = wanted if missing == 0 else 0
    else:
        activation, graphs = activation_bytes(candidate), _CUDA_GRAPH_BYTES
        non_torch = _NON_TORCH_BYTES[candidate.tensor_parallel_size > 1]
        budget = math.ceil(total * candidate.gpu_memory_utilization)
        left = budget - weights - non_torch - activation - graphs
        missing, available = max(0, -left), max(0, left)
    used = weights + activation + non_torch + graphs + available
    return MemoryUse(
        per_gpu=GpuMemory(
            total_bytes=total,
            weights_bytes=weights,
            activation_bytes=activation,
            non_torch_bytes=non_torch,
            cuda_graph_bytes=graphs,
            kv_cache_bytes=available,
            headroom_bytes=max(0, total - used),
        ),
        kv=kv_cache(
            kv_layout(candidate),
            available_bytes=available,
            max_model_len=candidate.max_model_len,
        ),
        missing_bytes=missing,
    )


def _stored_bytes(parameters: Parameters, precision: Precision) -> float:
    attention, feed_forward, rest = _bytes_per_weight(precision)
    wide = parameters.feed_forward + parameters.experts + parameters.shared_experts
    others = parameters.total - parameters.attention - wide
    return attention * parameters.attention + feed_forward * wide + rest * others


def _bytes_per_weight(precision: Precision) -> tuple[float, float, float]:
    """Bytes per weight of attention, of feed-forward and experts, and of everything else.

    FP8 has a 32-bit scale for each 128x128 block. NVFP4 (4 bits and an 8-bit scale for 16 weights)
    covers only feed-forward and experts: so computed, Mistral Large 3 has its published 403.1 GB.
    AWQ and GPTQ: 4 bits and 32 bits for 128 weights. Embeddings stay at 16 bits in all of them.
    """
    if precision in _GGUF_BITS:
        return (_GGUF_BITS[precision] / 8,) * 3
    if precision == "fp32":
        return 4.0, 4.0, 4.0
    if precision == "fp8":
        return 1 + 4 / 128**2, 1 + 4 / 128**2, 2.0
    if precision == "nvfp4":
        return 2.0, 4.5 / 8, 2.0
    if precision in ("awq", "gptq"):
        return 4.25 / 8, 4.25 / 8, 2.0
    return 2.0, 2.0, 2.0
