"""A catalogue entry from a model's own `config.json` (Hugging Face) or `params.json` (Mistral)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from placement.architecture import Architecture, MixtureOfExperts, VisionTower
from placement.catalogue import Checkpoint, ModelSpec, Precision
from placement.config_fields import (
    Config,
    build,
    full_attention_layers,
    latent_attention,
    optional_section,
    quotient,
    required,
    section,
    window,
)
from placement.errors import ConfigError
from placement.mistral_params import native_architecture
from placement.plausible import refuse_implausible

_DENSE = frozenset({"mistral", "ministral", "ministral3", "llama", "qwen2", "qwen3"})
_WITH_VISION = frozenset({"mistral3", "llava", "pixtral"})
_KNOWN = frozenset(
    {*_DENSE, *_WITH_VISION, "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "minimax_m2"}
)
_ALL_EXPERTS = frozenset({"mixtral", "gpt_oss", "minimax_m2"})  # intermediate_size: an expert's
_DTYPES: Mapping[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def model_from_config(name: str, config: Config, checkpoint_source: str) -> ModelSpec:
    """What `config` says of a model: its architecture, one checkpoint, its context.

    Understands the configurations of Mistral, Mixtral, Ministral, Llama, Qwen2, Qwen3 (dense and
    MoE), gpt-oss, MiniMax-M2, DeepSeek-V3 and Mistral 3 / Pixtral with their vision towers, and Mistral's params.json.

    Raises:
        ConfigError: another kind of model, or a field is missing or impossible.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{name}: the configuration is no JSON object")
    native = "dim" in config and "n_layers" in config
    architecture = native_architecture(name, config) if native else _hugging_face(name, config)
    _refuse_the_absurd(name, architecture)
    checkpoint = Checkpoint(
        precision=_precision(name, config),
        format="mistral" if native else "hf",
        source=checkpoint_source,
        quantisation_block=_quantisation_block(name, config),
    )
    vision = architecture.vision is not None
    return ModelSpec(
        name=name,
        title=name,
        architecture=architecture,
        checkpoints=(checkpoint,),
        context=architecture.max_position,
        capabilities=("chat", "completion", "vision") if vision else ("chat", "completion"),
        engine_args=_NATIVE_FLAGS if native else (),
    )


_NATIVE_FLAGS = (
    *("--tokenizer-mode", "mistral"),
    *("--config-format", "mistral"),
    *("--load-format", "mistral"),
)


def _hugging_face(name: str, config: Config) -> Architecture:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise ConfigError(
            f"{name}: model_type {kind!r} is not supported; known: {', '.join(sorted(_KNOWN))}"
        )
    if kind in _WITH_VISION and "text_config" in config:
        text = {"model_type": "mistral", **section(name, config, "text_config")}
        vision = _hugging_face_vision(name, config)
        return _hugging_face(name, text).model_copy(update={"vision": vision})
    heads = required(name, config, "num_attention_heads")
    hidden = required(name, config, "hidden_size")
    mla = None
    head_dim = config.get("head_dim") or quotient(name, hidden, heads)
    if kind == "deepseek_v3":
        mla = latent_attention(name, config)
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    return build(
        name,
        Architecture,
        hidden_size=hidden,
        num_layers=required(name, config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=None if kind in _ALL_EXPERTS else config.get("intermediate_size"),
        vocab_size=required(name, config, "vocab_size"),
        tied_embeddings=config.get("tie_word_embeddings") or False,
        attention_bias=kind == "qwen2" or config.get("attention_bias") or False,
        output_bias=kind == "gpt_oss",
        attention_sinks=kind == "gpt_oss",
        qk_norm=kind in {"qwen3", "qwen3_moe", "minimax_m2"},
        qk_norm_over_heads=kind == "minimax_m2",
        sliding_window=window(name, config),
        full_attention_layers=full_attention_layers(name, config),
        max_position=required(name, config, "max_position_embeddings"),
        mla=mla,
        moe=_EXPERTS.get(kind, _no_experts)(name, config),
    )


def _hugging_face_vision(name: str, config: Config) -> VisionTower:
    """A `pixtral` tower; Mistral 3 merges patches before the projector, Pixtral's Llava does not."""
    vision = section(name, config, "vision_config")
    heads = vision.get("num_attention_heads", 16)
    hidden = vision.get("hidden_size", 1024)
    merger = config.get("model_type") == "mistral3"
    return build(
        name,
        VisionTower,
        hidden_size=hidden,
        intermediate_size=vision.get("intermediate_size", 4096),
        num_layers=vision.get("num_hidden_layers", 24),
        num_heads=heads,
        head_dim=vision.get("head_dim") or quotient(name, hidden, heads),
        patch_size=vision.get("patch_size", 16),
        image_size=vision.get("image_size", 1024),
        num_channels=vision.get("num_channels", 3),
        spatial_merge_size=config.get("spatial_merge_size", 2 if merger else 1),
        patch_merger=merger,
        adapter_bias=config.get("multimodal_projector_bias", not merger),
    )


def _no_experts(name: str, config: Config) -> None:
    del name, config


def _mixtral_experts(name: str, config: Config) -> MixtureOfExperts:
    """Mixtral's `intermediate_size` is that of an expert."""
    return build(
        name,
        MixtureOfExperts,
        num_experts=required(name, config, "num_local_experts"),
        num_experts_per_token=required(name, config, "num_experts_per_tok"),
        expert_intermediate_size=required(name, config, "intermediate_size"),
        router_bias=config.get("model_type") in ("gpt_oss", "minimax_m2"),
        expert_bias=config.get("model_type") == "gpt_oss",
    )


def _qwen_experts(name: str, config: Config) -> MixtureOfExperts:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ConfigError(f"{name}: dense layers between layers of experts are not supported")
    return build(
        name,
        MixtureOfExperts,
        num_experts=required(name, config, "num_experts"),
        num_experts_per_token=required(name, config, "num_experts_per_tok"),
        expert_intermediate_size=required(name, config, "moe_intermediate_size"),
    )


def _deepseek_experts(name: str, config: Config) -> MixtureOfExperts:
    if config.get("moe_layer_freq", 1) != 1:
        raise ConfigError(f"{name}: dense layers between layers of experts are not supported")
    return build(
        name,
        MixtureOfExperts,
        num_experts=required(name, config, "n_routed_experts"),
        num_experts_per_token=required(name, config, "num_experts_per_tok"),
        expert_intermediate_size=required(name, config, "moe_intermediate_size"),
        num_shared_experts=config.get("n_shared_experts") or 0,
        num_dense_layers=config.get("first_k_dense_replace") or 0,
        router_bias=config.get("topk_method") == "noaux_tc",
    )


_EXPERTS: Mapping[str, Callable[[str, Config], MixtureOfExperts | None]] = {
    "gpt_oss": _mixtral_experts,
    "minimax_m2": _mixtral_experts,
    "mixtral": _mixtral_experts,
    "qwen3_moe": _qwen_experts,
    "deepseek_v3": _deepseek_experts,
}


def _precision(name: str, config: Config) -> Precision:
    """Of the stored weights; `bf16` when the configuration does not say."""
    quantisation = optional_section(name, config, "quantization_config", "quantization")
    method = str(quantisation.get("quant_method", "")).replace("_", "-")
    if method == "fp8" or quantisation.get("qformat_weight") == "fp8_e4m3":
        return "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method in ("awq", "gptq"):
        return "awq" if method == "awq" else "gptq"
    if method == "compressed-tensors":
        groups = optional_section(name, quantisation, "config_groups")
        first = next(iter(groups), "")
        weights = optional_section(name, optional_section(name, groups, first), "weights")
        floats = weights.get("type", "int") == "float"
        return ("fp8" if weights.get("num_bits") == 8 else "nvfp4") if floats else "gptq"
    text = optional_section(name, config, "text_config")
    dtype = config.get("torch_dtype") or config.get("dtype") or text.get("torch_dtype")
    return _DTYPES.get(str(dtype), "bf16")


def _quantisation_block(name: str, config: Config) -> int | None:
    block = optional_section(name, config, "quantization_config").get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    return max((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def _refuse_the_absurd(name: str, architecture: Architecture) -> None:
    refuse_implausible(name, architecture)
    moe = architecture.moe
    if architecture.num_heads % architecture.num_kv_heads:
        raise ConfigError(
            f"{name}: {architecture.num_heads} attention heads cannot share "
            f"{architecture.num_kv_heads} K/V heads"
        )
    if moe is None and architecture.intermediate_size is None:
        raise ConfigError(f"{name}: the configuration has no intermediate_size")
    if moe is not None and moe.num_experts_per_token > moe.num_experts:
        raise ConfigError(
            f"{name}: a token cannot use {moe.num_experts_per_token} of {moe.num_experts} experts"
        )
    if moe is not None and moe.num_dense_layers and architecture.intermediate_size is None:
        raise ConfigError(f"{name}: dense layers need an intermediate_size")
