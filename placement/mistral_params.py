"""Mistral's own configuration, params.json: what it says of an architecture."""

from __future__ import annotations

from typing import Any

from placement.architecture import Architecture, MixtureOfExperts, VisionTower
from placement.config_fields import (
    Config,
    build,
    latent_attention,
    quotient,
    required,
    section,
    window,
)


def native_architecture(name: str, config: Config) -> Architecture:
    """The architecture in a params.json.

    Raises:
        ConfigError: a field is missing or impossible.
    """
    heads, hidden = required(name, config, "n_heads"), config["dim"]
    mla = latent_attention(name, config) if config.get("kv_lora_rank") else None
    head_dim = config.get("head_dim") or quotient(name, hidden, heads)
    if mla is not None:
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    moe = section(name, config, "moe") if config.get("moe") else None
    vision = config.get("vision_encoder")
    if config.get("multimodal"):
        vision = section(name, config, "multimodal").get("vision_encoder_args")
    dense = moe is None or moe.get("first_k_dense_replace")
    return build(
        name,
        Architecture,
        hidden_size=hidden,
        num_layers=config["n_layers"],
        num_heads=heads,
        num_kv_heads=config.get("n_kv_heads") or heads,
        head_dim=head_dim,
        intermediate_size=required(name, config, "hidden_dim") if dense else None,
        vocab_size=required(name, config, "vocab_size"),
        tied_embeddings=config.get("tied_embeddings") or False,
        sliding_window=window(name, config),
        max_position=_native_context(name, config),
        mla=mla,
        moe=None if moe is None else _native_experts(name, config, moe),
        vision=_native_vision(name, vision) if vision else None,
    )


def _native_context(name: str, config: Config) -> Any:
    """Without a number vLLM assumes 128,000 (transformers_utils/configs/mistral.py)."""
    given = config.get("max_position_embeddings") or config.get("max_seq_len")
    if given is not None:
        return given
    if config.get("yarn"):
        yarn = section(name, config, "yarn")
        original = required(name, yarn, "original_max_position_embeddings")
        return int(required(name, yarn, "factor") * original)
    return 128_000


def _native_experts(name: str, config: Config, moe: Config) -> MixtureOfExperts:
    return build(
        name,
        MixtureOfExperts,
        num_experts=required(name, moe, "num_experts"),
        num_experts_per_token=required(name, moe, "num_experts_per_tok"),
        expert_intermediate_size=moe.get("expert_hidden_dim")
        or required(name, config, "hidden_dim"),
        num_shared_experts=moe.get("num_shared_experts") or 0,
        num_dense_layers=moe.get("first_k_dense_replace") or 0,
    )


def _native_vision(name: str, vision: Config) -> VisionTower:
    heads = required(name, vision, "num_attention_heads")
    hidden = required(name, vision, "hidden_size")
    merger = vision.get("mm_projector_id") == "patch_merge"
    return build(
        name,
        VisionTower,
        hidden_size=hidden,
        intermediate_size=required(name, vision, "intermediate_size"),
        num_layers=required(name, vision, "num_hidden_layers"),
        num_heads=heads,
        head_dim=vision.get("head_dim") or quotient(name, hidden, heads),
        patch_size=required(name, vision, "patch_size"),
        image_size=required(name, vision, "image_size"),
        num_channels=vision.get("num_channels", 3),
        spatial_merge_size=vision.get("spatial_merge_size", 1),
        patch_merger=merger,
        adapter_bias=vision.get("adapter_bias", not merger),
    )
