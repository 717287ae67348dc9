"""Bytes of a GGUF file by arithmetic: llama.cpp's formats give tensors different bits.

What follows is llama-quant.cpp (llama_tensor_get_type), as far as models like Mistral's go and
without an importance matrix. So Q4_K_M is 4.83 bits a weight for Mistral-7B and 4.78 for Large-2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from placement.architecture import Architecture
from placement.catalogue import Precision

_BITS: Mapping[str, float] = {
    "f32": 32, "f16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q4_k": 4.5, "q3_k": 3.4375,
    "q2_k": 2.625, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5, "iq4_xs": 4.25,
}  # fmt: skip
_BASE: Mapping[str, str] = {
    "q2_k": "q2_k", "q3_k_s": "q3_k", "q3_k_m": "q3_k", "q3_k_l": "q3_k", "q4_k_s": "q4_k",
    "q4_k_m": "q4_k", "q5_k_s": "q5_k", "q5_k_m": "q5_k", "q6_k": "q6_k", "q8_0": "q8_0",
    "q4_0": "q4_0", "q4_1": "q4_1", "q5_0": "q5_0", "q5_1": "q5_1", "iq4_xs": "iq4_xs",
    "iq4_nl": "iq4_nl", "fp32": "f32", "fp16": "f16", "bf16": "f16",
}  # fmt: skip
# For rows that are no multiple of 256 weights, the super-block of the K-quants.
_ODD_ROWS = {"q2_k": "q4_0", "q3_k": "q4_0", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1",
             "q6_k": "q8_0"}  # fmt: skip
# Like another format, but with embedding and head in Q8_0.
_LARGE: Mapping[str, Precision] = {
    "q2_k_l": "q2_k", "q4_k_l": "q4_k_m", "q5_k_l": "q5_k_m", "q6_k_l": "q6_k",
}  # fmt: skip
_EIGHT_EXPERTS_OUTPUT = frozenset(
    {"q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs"}
)


@dataclass(frozen=True, slots=True)
class GgufTensors:
    """Bytes of the language model: embedding, head with the last norm, and each layer."""

    embedding: int
    head: int
    dense_layers: tuple[int, ...]  # all but routed experts
    expert_layers: tuple[int, ...]  # routed experts

    @property
    def total(self) -> int:
        """Of the file, without its metadata."""
        return self.embedding + self.head + sum(self.dense_layers) + sum(self.expert_layers)


def gguf_tensors(architecture: Architecture, precision: Precision) -> GgufTensors | None:
    """Bytes of each part in `precision`, or None: a format whose mix is not known here."""
    large, precision = precision in _LARGE, _LARGE.get(precision, precision)
    base = _BASE.get(precision)
    if base is None:
        return None
    hidden, vocabulary = architecture.hidden_size, architecture.vocab_size
    head_type = base if base in ("f32", "f16", "q8_0") else "q6_k"
    embedding_type = head_type if architecture.tied_embeddings else base
    if large:
        head_type = embedding_type = "q8_0"
    tied = architecture.tied_embeddings
    embedding = _bytes(vocabulary * hidden, hidden, embedding_type)
    head = 0 if tied else _bytes(vocabulary * hidden, hidden, head_type)
    layers = range(architecture.num_layers)
    return GgufTensors(
        embedding=embedding,
        head=head + 4 * hidden,
        dense_layers=tuple(_dense_bytes(architecture, precision, base, i) for i in layers),
        expert_layers=tuple(_expert_bytes(architecture, precision, base, i) for i in layers),
    )


def _dense_bytes(architecture: Architecture, precision: str, base: str, layer: int) -> int:
    hidden, heads = architecture.hidden_size, architecture.num_heads
    norms = 2 * hidden + (2 * architecture.head_dim if architecture.qk_norm else 0)
    mla, moe = architecture.mla, architecture.moe
    down = _down_type(architecture, precision, base, layer)
    if mla is None:
        query = heads * architecture.head_dim
        value = architecture.num_kv_heads * architecture.head_dim
        size = _bytes(hidden * query, hidden, base)
        size += _bytes(hidden * value, hidden, _eight_experts(architecture, "q8_0") or base)
        size += _bytes(hidden * value, hidden, _value_type(architecture, precision, base, layer))
        size += _bytes(hidden * query, query, _output_type(architecture, precision, base))
    else:
        queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        rank = mla.q_lora_rank
        query = hidden * queries if rank is None else rank * (hidden + queries)
        size = _bytes(query, hidden, base)
        size += _bytes(hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim), hidden, base)
        wide = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        size += _bytes(mla.kv_lora_rank * wide, mla.kv_lora_rank, base)
        output = _output_type(architecture, precision, base)
        size += _bytes(hidden * heads * mla.v_head_dim, hidden, output)
        norms += (rank or 0) + mla.kv_lora_rank
    width = architecture.intermediate_size or 0
    if moe is not None and layer >= moe.num_dense_layers:
        width = moe.num_shared_experts * moe.expert_intermediate_size
        norms += moe.num_experts * (hidden + moe.router_bias)  # the router stays in 32 bits
    size += 2 * _bytes(hidden * width, hidden, base) + _bytes(hidden * width, width, down)
    return size + 4 * norms


def _expert_bytes(architecture: Architecture, precision: str, base: str, layer: int) -> int:
    moe, hidden = architecture.moe, architecture.hidden_size
    if moe is None or layer < moe.num_dense_layers:
        return 0
    matrix, width = moe.num_experts * hidden * moe.expert_intermediate_size, hidden
    down = _down_type(architecture, precision, base, layer)
    both = 2 * _bytes(matrix, width, base)
    return both + _bytes(matrix, moe.expert_intermediate_size, down)


def _bytes(weights: int, row: int, kind: str) -> int:
    if row % 256:
        kind = _ODD_ROWS.get(kind, kind)
    return int(weights * _BITS[kind] / 8)


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _eight_experts(architecture: Architecture, kind: str) -> str | None:
    moe = architecture.moe
    return kind if moe is not None and moe.num_experts == 8 else None


def _value_type(architecture: Architecture, precision: str, base: str, layer: int) -> str:
    layers = architecture.num_layers
    shared = architecture.num_heads // architecture.num_kv_heads >= 4
    choice: Mapping[str, Callable[[], str]] = {
        "q2_k": lambda: "q4_k" if shared else "q3_k",
        "q3_k_m": lambda: "q5_k" if layer < 2 else "q4_k",
        "q3_k_l": lambda: "q5_k",
        "iq4_nl": lambda: "q5_k" if shared else base,
        "iq4_xs": lambda: "q5_k" if shared else base,
        "q4_k_s": lambda: "q5_k" if layer < 4 else base,
        "q4_k_m": lambda: "q6_k" if _more_bits(layer, layers) else base,
        "q5_k_m": lambda: "q6_k" if _more_bits(layer, layers) else base,
    }
    kind = choice.get(precision, lambda: base)()
    if layers == 80 and kind in ("q3_k", "q4_k"):  # Llama-70B: eight heads share these
        kind = "q5_k"
    return kind if base in ("f32", "f16") else _eight_experts(architecture, "q8_0") or kind


def _down_type(architecture: Architecture, precision: str, base: str, layer: int) -> str:
    layers = architecture.num_layers
    first = layer < layers // 8
    choice: Mapping[str, Callable[[], str]] = {
        "q2_k": lambda: "q3_k",
        "q3_k_m": lambda: "q5_k" if layer < layers // 16 else "q4_k",
        "q3_k_l": lambda: "q5_k",
        "iq4_nl": lambda: "q5_k" if first else base,
        "iq4_xs": lambda: "q5_k" if first else base,
        "q4_k_s": lambda: "q5_k" if first else base,
        "q4_k_m": lambda: "q6_k" if _more_bits(layer, layers) else base,
        "q5_k_m": lambda: "q6_k" if _more_bits(layer, layers) else base,
    }
    return choice.get(precision, lambda: base)()


def _output_type(architecture: Architecture, precision: str, base: str) -> str:
    if _eight_experts(architecture, "q5_k") and precision in _EIGHT_EXPERTS_OUTPUT:
        return "q5_k"
    if _eight_experts(architecture, "q5_k"):
        return base
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(precision, base)
