"""Adapters (LoRA): the memory that an engine sets aside for them, and where it has none."""

from __future__ import annotations

from placement.architecture import Architecture, MixtureOfExperts, MultiheadLatentAttention
from placement.candidate import Candidate
from placement.pipeline import Stage

_LARGEST_VOCABULARY = 258_048  # lora/layers/logits_processor.py


def adapter_bytes(candidate: Candidate, stage: Stage) -> int:
    """What one rank of `stage` sets aside for adapters: `max_loras` slots of `max_lora_rank`.

    vLLM makes two matrices for every linear layer, of its inputs x rank and rank x its outputs,
    filled or not (lora/layers create_lora_weights). Inputs of a layer that is cut by columns and
    outputs of one that is cut by rows are whole on every rank. The vision tower has none.
    """
    limits = candidate.lora
    if limits is None:
        return 0
    slots = limits.max_loras * limits.max_lora_rank
    return slots * _rows(candidate, stage) * candidate.element_bytes


def _rows(candidate: Candidate, stage: Stage) -> int:
    """Inputs and outputs of all linear layers of a rank."""
    architecture, ranks = candidate.architecture, candidate.tensor_parallel_size
    hidden, moe = architecture.hidden_size, architecture.moe
    dense = stage.num_layers
    if moe is not None:
        dense = min(stage.num_layers, max(0, moe.num_dense_layers - stage.first_layer))
    rows = stage.num_layers * _attention(architecture, ranks)
    if dense:
        rows += dense * _feed_forward(hidden, (architecture.intermediate_size or 0) // ranks)
    if moe is None:
        return rows
    sparse = _experts(moe, candidate) + hidden + moe.num_experts  # and the router
    if moe.num_shared_experts:
        shared = moe.num_shared_experts * moe.expert_intermediate_size
        sparse += _feed_forward(hidden, shared // ranks)
    rows += (stage.num_layers - dense) * sparse
    if architecture.mla is None:  # mixtral.py: embedding and head take adapters too
        ends = stage.is_first + stage.is_last
        rows += ends * (architecture.vocab_size + hidden)
    return rows


def _attention(architecture: Architecture, ranks: int) -> int:
    hidden, heads = architecture.hidden_size, architecture.num_heads // ranks
    if architecture.mla is not None:
        return _latent_attention(architecture.mla, hidden, heads)
    kv_heads = max(1, architecture.num_kv_heads // ranks)
    width = architecture.head_dim
    return 3 * hidden + (heads + 2 * kv_heads) * width + heads * width + hidden


def _latent_attention(mla: MultiheadLatentAttention, hidden: int, heads: int) -> int:
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    query_width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    query = hidden + query_width
    if mla.q_lora_rank is not None:
        query = hidden + 2 * mla.q_lora_rank + query_width
    expanded = mla.kv_lora_rank + heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return query + hidden + latent + expanded + heads * mla.v_head_dim + hidden


def _feed_forward(hidden: int, width: int) -> int:
    """Gate and up, side by side, and down."""
    return 2 * (hidden + width) + width + hidden


def _experts(moe: MixtureOfExperts, candidate: Candidate) -> int:
    """Each expert of the rank has matrices of its own (lora/layers/fused_moe.py)."""
    shards = candidate.tensor_parallel_size * candidate.data_parallel_size
    hidden, width = candidate.architecture.hidden_size, moe.expert_intermediate_size
    if candidate.expert_parallel:
        return -(-moe.num_experts // shards) * _feed_forward(hidden, width)
    return moe.num_experts * _feed_forward(hidden, width // shards)


def adapters_need_gpu_for_experts(candidate: Candidate) -> str | None:
    """Adapters on experts run in a Triton kernel, which CPUs lack (fused_moe/experts)."""
    if candidate.lora is None or candidate.engine == "sim":
        return None
    if candidate.architecture.moe is None or not candidate.device.is_cpu:
        return None
    return f"vLLM has adapters for experts, which {candidate.model.name} has, on GPUs only"


def adapters_need_small_vocabulary(candidate: Candidate) -> str | None:
    """Where the head takes adapters, the kernel bounds its width."""
    architecture = candidate.architecture
    on_head = architecture.moe is not None and architecture.mla is None
    if candidate.lora is None or not on_head or architecture.vocab_size <= _LARGEST_VOCABULARY:
        return None
    return (
        f"vLLM has adapters for at most {_LARGEST_VOCABULARY:,} tokens, "
        f"{candidate.model.name} has {architecture.vocab_size:,}"
    )
