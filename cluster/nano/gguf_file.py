"""Nano models of the llama family as GGUF files: the same weights and tokenizer, for llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.nano.tokenizers import CHAT_TEMPLATE, HF_CONTROL_TOKENS, byte_pairs
from cluster.nano.weights import Tensor, values

Array = npt.NDArray[np.float32]

GGUF_FORMAT = 1  # raise it when the same recipe gives other bytes
GGUF_MODELS = ("nano-7b", "nano-mixtral")
GGUF_PRECISIONS = ("fp16", "q8_0")

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")
_EXPERT_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write_gguf(
    path: Path, name: str, config: Mapping[str, Any], tensors: Sequence[Tensor], precision: str
) -> None:
    """Write the model `name`, whose Hugging Face tensors and configuration these are."""
    import gguf  # noqa: PLC0415 - half a second, and only a first use of these models needs it

    writer = gguf.GGUFWriter(str(path), "llama")
    _write_metadata(writer, gguf, name, config, precision)
    whole = gguf.GGMLQuantizationType.F16
    kind = gguf.GGMLQuantizationType.Q8_0 if precision == "q8_0" else whole
    for tensor, weights in _named(config, name, tensors):
        if weights.ndim == 1 or "ffn_gate_inp" in tensor:  # llama.cpp keeps norms and routers exact
            writer.add_tensor(tensor, weights)
        else:
            writer.add_tensor(tensor, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(
    config: Mapping[str, Any], seed: str, tensors: Sequence[Tensor]
) -> Iterator[tuple[str, Array]]:
    """GGUF names and weights; a layer's experts are one tensor."""
    experts: dict[str, list[Array]] = {}
    for tensor in tensors:
        weights, plain = values(tensor, seed=seed), tensor.name.removesuffix(".weight")
        layer = _LAYER.fullmatch(plain)
        prefix, inner = (f"blk.{layer[1]}.", layer[2]) if layer else ("", plain)
        if expert := _EXPERT.fullmatch(inner):
            stacked = f"{prefix}{_EXPERT_NAMES[expert[2]]}.weight"
            experts.setdefault(stacked, []).append(weights)
            continue
        if inner in ("self_attn.q_proj", "self_attn.k_proj"):
            key = "num_attention_heads" if "q_proj" in inner else "num_key_value_heads"
            weights = _interleaved(weights, config[key])
        yield f"{prefix}{_NAMES[inner]}.weight", weights
    for stacked, parts in experts.items():
        yield stacked, np.stack(parts)


def _interleaved(weights: Array, heads: int) -> Array:
    """Rows of a head as llama.cpp rotates them: neighbours, not halves (convert_hf_to_gguf.py)."""
    rows, inputs = weights.shape
    halves = weights.reshape(heads, 2, rows // heads // 2, inputs)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, inputs))


def _write_metadata(
    writer: Any, gguf: Any, name: str, config: Mapping[str, Any], precision: str
) -> None:
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_Q8_0 if precision == "q8_0" else gguf.LlamaFileType.MOSTLY_F16
    )
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if experts := config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    tokens, merges = byte_pairs(config["vocab_size"])
    control = len(HF_CONTROL_TOKENS)
    kinds = [gguf.TokenType.CONTROL] * control + [gguf.TokenType.NORMAL] * (len(tokens) - control)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(value=True)
    writer.add_chat_template(CHAT_TEMPLATE)
