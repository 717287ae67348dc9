"""Our arithmetic against llama.cpp itself, on tiny models that the test writes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import xllamacpp

from placement.candidate import GIB
from placement.gguf_weights import weights_from_header
from placement.headers.gguf import read_gguf
from placement.headers.gguf_model import gguf_architecture
from placement.headers.ranges import LocalFile
from placement.llamacpp import (
    LlamaTask,
    compute_buffer_bytes,
    kv_bytes_per_layer_token,
    place,
)

pytestmark = pytest.mark.engine

MIB = 1024**2
_SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.port = int(sys.argv[2]), int(sys.argv[3]), 0
params.kv_unified, params.fit_params, params.warmup, params.verbosity = True, False, False, 10
xllamacpp.Server(params)
"""
DENSE = {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "ff": 1024}
LATENT = {"layers": 3, "hidden": 512, "heads": 8, "ff": 1024, "experts": 8}


def write_model(path: Path, *, latent: bool = False, **sizes: int) -> None:
    """A random model in llama.cpp's own format, by its own package."""
    writer = gguf.GGUFWriter(str(path), "deepseek2" if latent else "llama")
    _write_metadata(writer, gguf, latent=latent, **sizes)
    for name, shape, full in _tensors(latent=latent, **sizes):
        writer.add_tensor(name, np.zeros(shape, np.float32 if full else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: Any, gguf: Any, *, latent: bool, **sizes: int) -> None:
    vocab = sizes.get("vocab", 1024)
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_feed_forward_length(sizes["ff"])
    writer.add_head_count(sizes["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_file_type(1)
    if sizes.get("experts"):
        writer.add_expert_count(sizes["experts"])
        writer.add_expert_used_count(2)
    if latent:
        writer.add_head_count_kv(1)
        writer.add_key_length(576)
        writer.add_value_length(512)
        writer.add_key_length_mla(192)
        writer.add_value_length_mla(128)
        writer.add_rope_dimension_count(64)
        writer.add_q_lora_rank(256)
        writer.add_kv_lora_rank(512)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(sizes["ff"])
        writer.add_leading_dense_block_count(1)
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    else:
        writer.add_head_count_kv(sizes["kv_heads"])
        writer.add_key_length(sizes["head_dim"])
        writer.add_value_length(sizes["head_dim"])
        writer.add_rope_dimension_count(sizes["head_dim"])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{index}" for index in range(vocab - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocab - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(*, latent: bool, **sizes: int) -> list[tuple[str, tuple[int, ...], bool]]:
    hidden, ff, vocab = sizes["hidden"], sizes["ff"], sizes.get("vocab", 1024)
    found = [
        ("token_embd.weight", (vocab, hidden), False),
        ("output.weight", (vocab, hidden), False),
        ("output_norm.weight", (hidden,), True),
    ]
    for layer in range(sizes["layers"]):
        tensors = _latent(**sizes) if latent else _grouped(**sizes)
        tensors |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
        experts = sizes.get("experts", 0) if not latent or layer else 0
        if experts:
            tensors |= {
                "ffn_gate_inp": (experts, hidden),
                "ffn_gate_exps": (experts, ff, hidden),
                "ffn_up_exps": (experts, ff, hidden),
                "ffn_down_exps": (experts, hidden, ff),
            }
        names = ("ffn_gate", "ffn_up", "ffn_down") if not experts else ()
        if experts and latent:
            names = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
        for name in names:
            tensors[name] = (hidden, ff) if "down" in name else (ff, hidden)
        found += [
            (f"blk.{layer}.{name}.weight", shape, len(shape) == 1 or name == "ffn_gate_inp")
            for name, shape in tensors.items()
        ]
    return found


def _grouped(**sizes: int) -> dict[str, tuple[int, ...]]:
    hidden, width = sizes["hidden"], sizes["heads"] * sizes["head_dim"]
    keys = sizes["kv_heads"] * sizes["head_dim"]
    return {
        "attn_q": (width, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, width),
    }


def _latent(**sizes: int) -> dict[str, tuple[int, ...]]:
    hidden, heads = sizes["hidden"], sizes["heads"]
    return {
        "attn_q_a": (256, hidden),
        "attn_q_a_norm": (256,),
        "attn_q_b": (heads * 192, 256),
        "attn_kv_a_mqa": (576, hidden),
        "attn_kv_a_norm": (512,),
        "attn_k_b": (heads, 512, 128),
        "attn_v_b": (heads, 128, 512),
        "attn_output": (hidden, heads * 128),
    }


def logged_mib(path: Path, *, context: int, slots: int) -> dict[str, float]:
    """`model`, `KV` and `compute` buffer sizes that llama.cpp prints while it starts."""
    command = [sys.executable, "-u", "-c", _SERVE, str(path), str(context), str(slots)]
    found: dict[str, float] = {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            for line in server.stdout or ():
                match = re.search(r"CPU\S* +(model|KV|compute) buffer size = +([\d.]+) MiB", line)
                if match:
                    found[match[1]] = float(match[2])
                if "compute" in found:
                    break
        finally:
            server.kill()
    return found


def a_task(path: Path, *, context: int, slots: int) -> LlamaTask:
    header = read_gguf(LocalFile(path))
    architecture = gguf_architecture(header)
    weights = weights_from_header(header, architecture)
    return LlamaTask(architecture, weights, context, num_slots=slots)


@pytest.mark.parametrize(
    ("latent", "sizes", "context", "slots"),
    [
        (False, DENSE, 2048, 1),
        (False, DENSE, 4096, 4),
        (False, {**DENSE, "hidden": 1024, "ff": 3584, "vocab": 32000}, 4096, 1),
        (False, {**DENSE, "experts": 8}, 4096, 1),
        (True, LATENT, 2048, 1),
        (True, {**LATENT, "heads": 16, "hidden": 1024}, 4096, 1),
    ],
)
def test_buffers_are_those_that_llama_cpp_logs(
    tmp_path: Path, latent: bool, sizes: dict[str, int], context: int, slots: int
):
    path = tmp_path / "tiny.gguf"
    write_model(path, latent=latent, **sizes)
    task = a_task(path, context=context, slots=slots)

    logged = logged_mib(path, context=context, slots=slots)

    weights = task.weights.embedding + task.weights.head
    weights += sum(layer.dense + layer.experts for layer in task.weights.layers)
    per_layer = kv_bytes_per_layer_token(task.architecture)
    cache = task.cells * per_layer * task.architecture.num_layers
    assert weights / MIB == pytest.approx(logged["model"], abs=0.02)
    assert cache / MIB == pytest.approx(logged["KV"], abs=0.01)
    compute = compute_buffer_bytes(task) / MIB
    assert logged["compute"] <= compute + 0.02
    assert compute == pytest.approx(logged["compute"], rel=0.05)


def test_a_header_read_by_the_gguf_package_says_the_same(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    write_model(path, **DENSE)

    theirs = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(str(path)).tensors}

    ours = {tensor.name: tensor.num_bytes for tensor in read_gguf(LocalFile(path)).tensors}
    assert ours == theirs


def test_layers_on_the_gpu_agree_with_the_estimate_that_xllamacpp_brings(tmp_path: Path):
    """Theirs is Ollama's old rule, with larger graphs and half a GiB of reserve: not far off."""
    path = tmp_path / "tiny.gguf"
    write_model(path, **{**DENSE, "layers": 12, "hidden": 512, "ff": 8192})
    task = a_task(path, context=512, slots=1)
    layer = task.weights.layers[0].dense
    free = GIB + GIB // 2 + 6 * layer

    theirs = xllamacpp.estimate_gpu_layers(
        [{"name": "CUDA", "memory_free": free - GIB, "memory_min": GIB // 2}],
        str(path), [], context_length=512, batch_size=512, num_parallel=1, kv_cache_type="",
    )  # fmt: skip

    ours = place(replace(task), memory_bytes=free, num_gpus=1)
    assert ours is not None
    assert abs(ours.gpu_layers - theirs.layers) <= 3
