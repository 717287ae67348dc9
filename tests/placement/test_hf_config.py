from __future__ import annotations

from typing import Any

import pytest

from placement.errors import ConfigError
from placement.hf_config import model_from_config
from placement.parameters import count_parameters
from tests.placement.builders import CATALOGUE

MISTRAL = {
    "model_type": "mistral", "torch_dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
    "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    **MISTRAL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
    "sliding_window": None,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "sliding_window": 32768, "use_sliding_window": False,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3 = {
    **QWEN2, "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
MISTRAL3 = {
    "model_type": "mistral3", "torch_dtype": "bfloat16", "spatial_merge_size": 2,
    "multimodal_projector_bias": False,
    "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 131072,
    },
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "head_dim": 64, "patch_size": 14,
        "image_size": 1540,
    },
}  # fmt: skip
LARGE_3 = {
    "dim": 7168, "n_layers": 61, "n_heads": 128, "n_kv_heads": 128, "hidden_dim": 16384,
    "vocab_size": 131072, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "tied_embeddings": False,
    "yarn": {"factor": 36, "original_max_position_embeddings": 8192},
    "moe": {
        "num_experts": 128, "num_experts_per_tok": 4, "expert_hidden_dim": 4096,
        "num_shared_experts": 1, "first_k_dense_replace": 3, "route_every_n": 1,
    },
    "vision_encoder": {
        "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 1540, "spatial_merge_size": 2,
        "mm_projector_id": "patch_merge", "adapter_bias": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (MISTRAL, 7_241_732_096),
        (MIXTRAL, 46_702_792_704),
        (QWEN2, 494_032_768),
        (QWEN3, 596_049_920),
        (QWEN3_MOE, 30_532_122_624),
        (DEEPSEEK_V3, 671_026_404_352),
        (MISTRAL3, 24_011_361_280),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_configuration_gives_the_parameters_of_the_real_model(
    config: dict[str, Any], total: int
) -> None:
    assert count_parameters(model_from_config("m", config, "m").architecture).total == total


def test_params_json_of_large_3_gives_the_catalogues_architecture() -> None:
    model = model_from_config("m", LARGE_3, "/models/large")

    assert model.architecture == CATALOGUE.model("mistral-large-3").architecture
    assert model.checkpoints[0].format == "mistral"
    assert "--load-format" in model.engine_args


def test_the_checkpoint_is_where_the_configuration_was() -> None:
    model = model_from_config("repo/name", MISTRAL, "/models/m")

    assert model.name == "repo/name"
    assert model.checkpoints[0].source == "/models/m"
    assert model.context == 32768
    assert model.architecture.sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "bf16"),
        ({"torch_dtype": "float32"}, "fp32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
                }
            },
            "nvfp4",
        ),
    ],
)
def test_precision_is_that_of_the_stored_weights(changes: Any, precision: str) -> None:
    model = model_from_config("m", {**MISTRAL, **changes}, "m")

    assert model.checkpoints[0].precision == precision


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type None is not supported; known: deepseek_v3"),
        ({**MISTRAL, "model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({**MISTRAL, "hidden_size": None}, "no hidden_size"),
        ({**MISTRAL, "num_hidden_layers": -3}, "num_layers: .*greater than 0, got -3"),
        ({**MISTRAL, "vocab_size": "many"}, "vocab_size: .*valid integer, got 'many'"),
        ({**MISTRAL, "num_attention_heads": 33}, "without head_dim"),
        ({**MISTRAL, "num_key_value_heads": 5}, "cannot share 5 K/V heads"),
        ({**MISTRAL, "intermediate_size": None}, "no intermediate_size"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "cannot use 9 of 8 experts"),
        ({**DEEPSEEK_V3, "q_lora_rank": None}, "no q_lora_rank"),
        ({**MISTRAL, "layer_types": ["full_attention", "chunked_attention"]}, "differ between"),
        ({**MISTRAL3, "text_config": 3}, "text_config is 3 instead of an object"),
        ({**LARGE_3, "moe": [1]}, r"moe is \[1\] instead of an object"),
    ],
)
def test_what_is_missing_or_absurd_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_from_config("m", config, "m")


GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4,
    "vocab_size": 201088, "attention_bias": True, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


def test_gpt_oss_has_windows_in_every_other_layer_and_its_published_parameters() -> None:
    model = model_from_config("gpt-oss", GPT_OSS, "x")

    assert model.architecture.sliding_window == 128
    assert model.architecture.full_attention_layers == 18
    assert model.checkpoints[0].precision == "mxfp4"
    assert count_parameters(model.architecture).total == 116_829_156_672


def test_fp8_blocks_are_read() -> None:
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    blocks = {**MISTRAL, "quantization_config": quantisation}

    assert model_from_config("x", blocks, "x").checkpoints[0].quantisation_block == 128
    assert model_from_config("x", MISTRAL, "x").checkpoints[0].quantisation_block is None
