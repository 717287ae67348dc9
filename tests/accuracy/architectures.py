"""Models of other vendors that stand in the measurements: their `config.json`, as far as it counts.

From memory of the published files, checked against the published parameter counts (`PARAMETERS`).
"""

from __future__ import annotations

from typing import Any

from placement.catalogue import ModelSpec
from placement.hf_config import model_from_config


def _llama(hidden: int, layers: int, heads: int, feed_forward: int, **more: Any) -> dict[str, Any]:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": feed_forward,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    }
    return {**config, **more}


def _qwen(kind: str, hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    config = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    }
    return {**config, **more}


_LLAMA_1 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "topk_method": "noaux_tc",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4"},
}
_MINIMAX = {
    "model_type": "minimax_m2",
    "hidden_size": 3072,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 1536,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "vocab_size": 200064,
    "max_position_embeddings": 196608,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 32, 32, 11008, num_key_value_heads=32, **_LLAMA_1),
    "llama-2-70b": _llama(8192, 80, 64, 28672, **_LLAMA_1),
    "llama-3.1-8b": _llama(4096, 32, 32, 14336),
    "llama-3.1-70b": _llama(8192, 80, 64, 28672),
    "llama-3.1-405b": _llama(16384, 126, 128, 53248),
    "qwen2.5-7b": _qwen(
        *("qwen2", 3584, 28, 28),
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        max_position_embeddings=32768,
    ),
    "qwen3-0.6b": _qwen("qwen3", 1024, 28, 16, intermediate_size=3072, tie_word_embeddings=True),
    "qwen3-8b": _qwen("qwen3", 4096, 36, 32, intermediate_size=12288),
    "qwen3-14b": _qwen("qwen3", 5120, 40, 40, intermediate_size=17408),
    "qwen3-32b": _qwen("qwen3", 5120, 64, 64, intermediate_size=25600),
    "qwen3-30b-a3b": _qwen(
        *("qwen3_moe", 2048, 48, 32),
        num_key_value_heads=4,
        intermediate_size=6144,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": _qwen(
        *("qwen3_moe", 4096, 94, 64),
        num_key_value_heads=4,
        intermediate_size=12288,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
    ),
    "gpt-oss-120b": _GPT_OSS,
    "gpt-oss-20b": {
        **_GPT_OSS,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "deepseek-v3": _DEEPSEEK_V3,
    "minimax-m2.5": _MINIMAX,
}
ALIASES = {
    "llama-3-70b": "llama-3.1-70b",
    "llama-3.3-70b": "llama-3.1-70b",
    "llama-3-8b": "llama-3.1-8b",
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-v3/r1": "deepseek-v3",
    "deepseek-v3/r1 671b": "deepseek-v3",
    "deepseek-v3-671b": "deepseek-v3",
}
# Checkpoints that are not as usual for their precision. Meta's FP8 (fbgemm) leaves attention and the
# first and last layer in 16 bits: one byte less for the feed-forward of 124 layers.
SIZES = {("llama-3.1-405b", "fp8"): 2 * 405_853_388_800 - 124 * 3 * 16384 * 53248}
QUANTISED: dict[tuple[str, str], tuple[str, ...]] = {("llama-3.1-405b", "fp8"): ("feed_forward",)}
PARAMETERS = {  # as published, to the integer where a checkpoint tells
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-120b": 116_829_156_672,
}


def other_model(name: str) -> ModelSpec | None:
    """The model called `name` in the measurements, or None: not one of ours either."""
    name = ALIASES.get(name.lower(), name.lower())
    if name not in CONFIGS:
        return None
    return model_from_config(name, CONFIGS[name], f"vendor/{name}")
