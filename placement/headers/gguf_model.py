"""The architecture in a GGUF file's metadata (llama.cpp src/llama-arch.cpp, LLM_KV_NAMES)."""

from __future__ import annotations

from typing import Any

from placement.architecture import Architecture, MixtureOfExperts, MultiheadLatentAttention
from placement.config_fields import build
from placement.errors import ConfigError
from placement.headers.gguf import GgufHeader, LongArray
from placement.plausible import refuse_implausible

# Mistral and Mixtral are `llama`; Mistral Large 3 is `deepseek2` or `mistral4` by converter version.
KNOWN = frozenset({
    "llama", "mistral3", "mistral4", "deepseek2", "qwen2", "qwen3", "qwen3moe",
})  # fmt: skip


def gguf_architecture(header: GgufHeader) -> Architecture:
    """The numbers of the language model.

    Raises:
        ConfigError: another kind of model, or a number is missing or impossible.
    """
    kind = header.architecture
    if kind not in KNOWN:
        raise ConfigError(
            f"{header.name}: general.architecture {kind!r} is not supported; known: "
            f"{', '.join(sorted(KNOWN))}"
        )
    heads, hidden = _number(header, "attention.head_count"), _number(header, "embedding_length")
    mla = _latent(header)
    head_dim = _optional(header, "attention.key_length") or (hidden // heads if heads else 0)
    if mla is not None:
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    architecture = build(
        header.name,
        Architecture,
        hidden_size=hidden,
        num_layers=_number(header, "block_count"),
        num_heads=heads,
        num_kv_heads=heads if mla is not None else _kv_heads(header, heads),
        head_dim=head_dim,
        intermediate_size=_optional(header, "feed_forward_length"),
        vocab_size=_vocabulary(header),
        tied_embeddings=not any(tensor.name == "output.weight" for tensor in header.tensors),
        attention_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3moe"),
        sliding_window=_optional(header, "attention.sliding_window") or None,
        max_position=_number(header, "context_length"),
        mla=mla,
        moe=_experts(header),
    )
    refuse_implausible(header.name, architecture)
    if architecture.num_heads % architecture.num_kv_heads:
        raise ConfigError(
            f"{header.name}: {heads} attention heads cannot share {architecture.num_kv_heads} "
            f"K/V heads"
        )
    return architecture


def _latent(header: GgufHeader) -> MultiheadLatentAttention | None:
    if not _optional(header, "attention.kv_lora_rank"):
        return None
    rope = _number(header, "rope.dimension_count")
    key = _optional(header, "attention.key_length_mla") or _number(header, "attention.key_length")
    value = _optional(header, "attention.value_length_mla")
    return build(
        header.name,
        MultiheadLatentAttention,
        q_lora_rank=_number(header, "attention.q_lora_rank"),
        kv_lora_rank=_number(header, "attention.kv_lora_rank"),
        qk_nope_head_dim=key - rope,
        qk_rope_head_dim=rope,
        v_head_dim=value or _number(header, "attention.value_length"),
    )


def _experts(header: GgufHeader) -> MixtureOfExperts | None:
    experts = _optional(header, "expert_count")
    if not experts:
        return None
    size = _optional(header, "expert_feed_forward_length")
    return build(
        header.name,
        MixtureOfExperts,
        num_experts=experts,
        num_experts_per_token=_number(header, "expert_used_count"),
        expert_intermediate_size=size or _number(header, "feed_forward_length"),
        num_shared_experts=_optional(header, "expert_shared_count") or 0,
        num_dense_layers=_optional(header, "leading_dense_block_count") or 0,
    )


def _kv_heads(header: GgufHeader, heads: int) -> int:
    value = header.metadata.get(f"{header.architecture}.attention.head_count_kv", heads)
    if isinstance(value, list):  # one for each layer
        if len(set(value)) != 1 or not isinstance(value[0], int):
            raise ConfigError(f"{header.name}: K/V heads that differ between layers")
        return int(value[0])
    return _optional(header, "attention.head_count_kv") or heads


def _vocabulary(header: GgufHeader) -> int:
    given = _optional(header, "vocab_size")
    if given:
        return given
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray):
        return tokens.length
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
            return tensor.shape[1]
    raise ConfigError(f"{header.name}: neither vocab_size, nor tokens, nor token_embd.weight")


def _number(header: GgufHeader, key: str) -> int:
    value = _optional(header, key)
    if value is None:
        raise ConfigError(f"{header.name}: the metadata has no {header.architecture}.{key}")
    return value


def _optional(header: GgufHeader, key: str) -> int | None:
    value: Any = header.metadata.get(f"{header.architecture}.{key}")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{header.name}: {header.architecture}.{key} is {value!r}")
    return value
