"""What each nano model is made of: its configuration file, tokenizer and tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.nano import tokenizers
from cluster.nano.weights import Tensor, embedding, linear, norm, output

Config = Mapping[str, Any]

NANO_LARGE_3: Config = {  # Mistral Large 3: latent attention, shared and routed experts, yarn
    "dim": 64,
    "n_layers": 4,
    "head_dim": 128,
    "hidden_dim": 256,
    "n_heads": 4,
    "n_kv_heads": 4,
    "rope_theta": 10000.0,
    "norm_eps": 1e-06,
    "vocab_size": 131072,
    "tied_embeddings": False,
    "max_position_embeddings": 294912,
    "max_seq_len": 294912,
    "dtype": "bfloat16",
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "yarn": {
        "original_max_position_embeddings": 8192,
        "factor": 36,
        "apply_scale": False,
        "beta": 32,
        "alpha": 1,
    },
    "moe": {
        "route_every_n": 1,
        "first_k_dense_replace": 1,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": 64,
        "num_shared_experts": 1,
    },
}

NANO_SMALL: Config = {  # Mistral Small 3.2: heads narrower than dim / n_heads, a Pixtral tower
    "dim": 320,
    "n_layers": 6,
    "head_dim": 32,
    "hidden_dim": 1024,
    "n_heads": 8,
    "n_kv_heads": 2,
    "rope_theta": 1000000000.0,
    "norm_eps": 1e-05,
    "vocab_size": 8192,
    "tied_embeddings": False,
    "max_position_embeddings": 131072,
    "max_seq_len": 131072,
    "dtype": "bfloat16",
    "vision_encoder": {
        "hidden_size": 128,
        "num_channels": 3,
        "image_size": 448,
        "max_image_size": 448,
        "patch_size": 14,
        "rope_theta": 10000.0,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "adapter_bias": False,
        "mm_projector_id": "patch_merge",
        "spatial_merge_size": 2,
        "add_pre_mm_projector_layer_norm": True,
        "image_token_id": 10,
        "image_break_token_id": 12,
        "image_end_token_id": 13,
    },
}

NANO_MIXTRAL: Config = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

NANO_7B: Config = {  # Mistral 7B v0.1: grouped queries, a sliding window
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 896,
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to write one model."""

    config: Config
    config_file: str
    weights_file: str
    tensors: Callable[[Config], Iterator[Tensor]]
    tokenizer: Callable[[Path, Config], None]

    def write_config(self, folder: Path) -> None:
        """Write the configuration, and how long an answer is when nobody says.

        Control tokens never win, so an answer has no end of its own.
        """
        _write_json(folder / self.config_file, self.config)
        generation = {"bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 256}
        _write_json(folder / "generation_config.json", generation)


def _large_3_tensors(config: Config) -> Iterator[Tensor]:
    dim, heads, moe = config["dim"], config["n_heads"], config["moe"]
    q_rank, kv_rank, rope = (
        config[key] for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")
    )
    nope, v_head_dim = config["qk_nope_head_dim"], config["v_head_dim"]
    yield embedding("tok_embeddings.weight", config["vocab_size"], dim)
    for i in range(config["n_layers"]):
        layer = f"layers.{i}"
        yield norm(f"{layer}.attention_norm.weight", dim)
        yield linear(f"{layer}.attention.wq_a.weight", q_rank, dim)
        yield norm(f"{layer}.attention.q_a_norm.weight", q_rank)
        yield linear(f"{layer}.attention.wq_b.weight", heads * (nope + rope), q_rank)
        yield linear(f"{layer}.attention.wkv_a_with_mqa.weight", kv_rank + rope, dim)
        yield norm(f"{layer}.attention.kv_a_norm.weight", kv_rank)
        yield linear(f"{layer}.attention.wkv_b.weight", heads * (nope + v_head_dim), kv_rank)
        yield linear(f"{layer}.attention.wo.weight", dim, heads * v_head_dim)
        yield norm(f"{layer}.ffn_norm.weight", dim)
        if i < moe["first_k_dense_replace"]:
            yield from _feed_forward(f"{layer}.feed_forward", dim, config["hidden_dim"])
            continue
        width = moe["expert_hidden_dim"]
        yield linear(f"{layer}.gate.weight", moe["num_experts"], dim)
        shared = width * moe["num_shared_experts"]
        yield from _feed_forward(f"{layer}.shared_experts", dim, shared)
        for expert in range(moe["num_experts"]):
            yield from _feed_forward(f"{layer}.experts.{expert}", dim, width)
    yield norm("norm.weight", dim)
    control = tokenizers.NUM_TEKKEN_CONTROL_TOKENS
    yield output("output.weight", config["vocab_size"], dim, control)


def _small_tensors(config: Config) -> Iterator[Tensor]:
    dim, vision = config["dim"], config["vision_encoder"]
    yield embedding("tok_embeddings.weight", config["vocab_size"], dim)
    for i in range(config["n_layers"]):
        heads = (config["n_heads"], config["n_kv_heads"], config["head_dim"])
        yield from _native_layer(f"layers.{i}", dim, config["hidden_dim"], heads)
    yield norm("norm.weight", dim)
    control = tokenizers.NUM_TEKKEN_CONTROL_TOKENS
    yield output("output.weight", config["vocab_size"], dim, control)
    yield from _vision_tensors(vision, dim)


def _vision_tensors(vision: Config, dim: int) -> Iterator[Tensor]:
    width, patch, channels = vision["hidden_size"], vision["patch_size"], vision["num_channels"]
    std = (channels * patch * patch) ** -0.5
    shape = (width, channels, patch, patch)
    yield Tensor("vision_encoder.patch_conv.weight", shape, std)
    yield norm("vision_encoder.ln_pre.weight", width)
    num_heads = vision["num_attention_heads"]
    for i in range(vision["num_hidden_layers"]):
        name = f"vision_encoder.transformer.layers.{i}"
        heads = (num_heads, num_heads, width // num_heads)
        yield from _native_layer(name, width, vision["intermediate_size"], heads)
    yield norm("pre_mm_projector_norm.weight", width)
    merged = width * vision["spatial_merge_size"] ** 2
    yield linear("patch_merger.merging_layer.weight", width, merged)
    yield linear("vision_language_adapter.w_in.weight", dim, width)
    yield linear("vision_language_adapter.w_out.weight", dim, dim)


def _native_layer(
    layer: str, dim: int, hidden_dim: int, heads: tuple[int, int, int]
) -> Iterator[Tensor]:
    num_heads, num_kv_heads, head_dim = heads
    yield norm(f"{layer}.attention_norm.weight", dim)
    yield linear(f"{layer}.attention.wq.weight", num_heads * head_dim, dim)
    yield linear(f"{layer}.attention.wk.weight", num_kv_heads * head_dim, dim)
    yield linear(f"{layer}.attention.wv.weight", num_kv_heads * head_dim, dim)
    yield linear(f"{layer}.attention.wo.weight", dim, num_heads * head_dim)
    yield norm(f"{layer}.ffn_norm.weight", dim)
    yield from _feed_forward(f"{layer}.feed_forward", dim, hidden_dim)


def _hf_tensors(config: Config) -> Iterator[Tensor]:
    dim, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = (
        config["num_attention_heads"] * head_dim,
        config["num_key_value_heads"] * head_dim,
    )
    yield embedding("model.embed_tokens.weight", config["vocab_size"], dim)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield norm(f"{layer}.input_layernorm.weight", dim)
        yield linear(f"{layer}.self_attn.q_proj.weight", queries, dim)
        yield linear(f"{layer}.self_attn.k_proj.weight", keys, dim)
        yield linear(f"{layer}.self_attn.v_proj.weight", keys, dim)
        yield linear(f"{layer}.self_attn.o_proj.weight", dim, queries)
        yield norm(f"{layer}.post_attention_layernorm.weight", dim)
        width = config["intermediate_size"]
        if num_experts := config.get("num_local_experts"):
            moe = f"{layer}.block_sparse_moe"
            yield linear(f"{moe}.gate.weight", num_experts, dim)
            for expert in range(num_experts):
                yield from _feed_forward(f"{moe}.experts.{expert}", dim, width)
        else:
            yield linear(f"{layer}.mlp.gate_proj.weight", width, dim)
            yield linear(f"{layer}.mlp.down_proj.weight", dim, width)
            yield linear(f"{layer}.mlp.up_proj.weight", width, dim)
    yield norm("model.norm.weight", dim)
    control = len(tokenizers.HF_CONTROL_TOKENS)
    yield output("lm_head.weight", config["vocab_size"], dim, control)


def _feed_forward(name: str, dim: int, hidden_dim: int) -> Iterator[Tensor]:
    yield linear(f"{name}.w1.weight", hidden_dim, dim)
    yield linear(f"{name}.w2.weight", dim, hidden_dim)
    yield linear(f"{name}.w3.weight", hidden_dim, dim)


def _tekken(folder: Path, config: Config) -> None:
    image = None
    if vision := config.get("vision_encoder"):
        image = {
            "image_patch_size": vision["patch_size"],
            "max_image_size": vision["max_image_size"],
            "spatial_merge_size": vision["spatial_merge_size"],
        }
    tokenizers.write_tekken(folder, config["vocab_size"], image)


def _hf_tokenizer(folder: Path, config: Config) -> None:
    tokenizers.write_hf(folder, config["vocab_size"], config["max_position_embeddings"])


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


_MISTRAL = ("params.json", "consolidated.safetensors")
_HF = ("config.json", "model.safetensors")

RECIPES: Mapping[str, Recipe] = {
    "nano-large-3": Recipe(NANO_LARGE_3, *_MISTRAL, _large_3_tensors, _tekken),
    "nano-mixtral": Recipe(NANO_MIXTRAL, *_HF, _hf_tensors, _hf_tokenizer),
    "nano-7b": Recipe(NANO_7B, *_HF, _hf_tensors, _hf_tokenizer),
    "nano-small": Recipe(NANO_SMALL, *_MISTRAL, _small_tensors, _tekken),
}
NAMES = tuple(RECIPES)
