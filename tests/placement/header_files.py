"""Safetensors and GGUF bytes for tests, written without the libraries that are tested against."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from placement.headers.gguf import GGML_TYPES
from placement.headers.ranges import BytesInMemory

_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
_TYPE_IDS = {name: kind for kind, (name, _, _) in GGML_TYPES.items()}


def safetensors_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int]]], *, data: bool = True
) -> bytes:
    """A file with these dtypes and shapes, all zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (bytes(end) if data else b"")


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, Sequence[int]]]
) -> bytes:
    """A version 3 file; shapes in ggml's order, the fastest dimension first."""
    body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        body += _text(key) + _value(value)
    offset = 0
    for name, (kind, shape) in tensors.items():
        _, block, block_bytes = GGML_TYPES[_TYPE_IDS[kind]]
        body += _text(name) + struct.pack("<I", len(shape))
        body += struct.pack(f"<{len(shape)}Q", *shape)
        body += struct.pack("<IQ", _TYPE_IDS[kind], offset)
        offset += -(-math.prod(shape) // block * block_bytes // 32) * 32
    padding = -len(body) % 32
    return body + bytes(padding) + bytes(offset)


def a_mistral_gguf(**changes: int) -> bytes:
    """A two-layer `llama` model with grouped queries, F16, or with `expert_count` a Mixtral."""
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ff": 128, "vocab": 96}
    sizes |= {key: value for key, value in changes.items() if key in sizes}
    hidden, vocab, ff = sizes["hidden"], sizes["vocab"], sizes["ff"]
    head_dim = hidden // sizes["heads"]
    metadata = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": sizes["layers"],
        "llama.context_length": 4096,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ff,
        "llama.attention.head_count": sizes["heads"],
        "llama.attention.head_count_kv": sizes["kv_heads"],
        "llama.vocab_size": vocab,
    }
    experts = changes.get("experts", 0)
    if experts:
        metadata |= {"llama.expert_count": experts, "llama.expert_used_count": 2}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("F16", (hidden, vocab)),
        "output_norm.weight": ("F32", (hidden,)),
    }
    if not changes.get("tied"):
        tensors["output.weight"] = ("F16", (hidden, vocab))
    for layer in range(sizes["layers"]):
        name = f"blk.{layer}."
        tensors[name + "attn_norm.weight"] = ("F32", (hidden,))
        tensors[name + "attn_q.weight"] = ("F16", (hidden, hidden))
        tensors[name + "attn_k.weight"] = ("F16", (hidden, head_dim * sizes["kv_heads"]))
        if experts:
            tensors[name + "ffn_gate_inp.weight"] = ("F32", (hidden, experts))
            tensors[name + "ffn_up_exps.weight"] = ("F16", (hidden, ff, experts))
        else:
            tensors[name + "ffn_up.weight"] = ("F16", (hidden, ff))
    return gguf_bytes(metadata, tensors)


def in_memory(content: bytes, name: str = "file") -> BytesInMemory:
    return BytesInMemory(name, content)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    items = [_value(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return (
        struct.pack("<I", 9)
        + kind
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )
