"""Kernel times of an RTX 4090 (Llama-3.1-8B in bf16, LLMServingSim's profile): shares and sums.

Nothing but kernels: what an engine's host adds to a step is not in them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from placement.performance import ReplicaSpeed, replica_speed, step_s
from tests.accuracy.architectures import other_model
from tests.accuracy.cases import CATALOGUE
from tests.placement.builders import a_candidate, a_gpu_device

FOLDER = Path(__file__).with_name("rtx4090")
GPU = CATALOGUE.gpu("RTX-4090")
_MATRICES = {  # rows and columns
    "qkv_proj": (4096, 6144),
    "o_proj": (4096, 4096),
    "gate_up_proj": (4096, 28672),
    "down_proj": (14336, 4096),
}
_SMALL = ("act_fn", "layernorm", "rotary_emb")
_LAYERS = 32
_KV_BYTES = 2 * 8 * 128 * 2  # of a token in a layer
_FEW = 64  # tokens, up to which reading weights takes longer than using them
_MANY = 1024
STEPS = tuple((batch, context) for batch in (1, 4, 16, 64, 256) for context in (128, 1024, 4096))


def bandwidth_share() -> float:
    """Of the data sheet, by least squares: seconds = bytes / share / bandwidth."""
    points = [
        (2.0 * rows * columns, _times("dense")[name, tokens])
        for name, (rows, columns) in _MATRICES.items()
        for tokens in _tokens(1, _FEW)
    ]
    return _slope(points) / GPU.memory_bandwidth_bytes_per_s


def flops_share() -> float:
    """Of the 16-bit peak, by least squares over steps of many tokens."""
    points = [
        (2.0 * rows * columns * tokens, _times("dense")[name, tokens])
        for name, (rows, columns) in _MATRICES.items()
        for tokens in _tokens(_MANY, 2048)
    ]
    return _slope(points) / GPU.bf16_flops


def kernel_s() -> float:
    """Median time of kernels that have next to nothing to do."""
    return median(_times("dense")[name, tokens] for name in _SMALL for tokens in _tokens(1, 16))


def decode_s(batch: int, context: int) -> float:
    """The sum of a step's kernels: `batch` requests with `context` tokens each."""
    dense, heads = _times("dense"), _times("per_sequence")
    layer = sum(dense[name, batch] for name in (*_MATRICES, *_SMALL, "layernorm"))
    last = dense["final_layernorm", batch] + heads["lm_head", batch] + heads["sampler", batch]
    return _LAYERS * (layer + _attention()[batch, context]) + last + dense["embedding", batch]


def ours() -> ReplicaSpeed:
    """The same model and GPU as we see it."""
    model = other_model("llama-3.1-8b")
    assert model is not None
    return replica_speed(a_candidate(model, device=a_gpu_device("RTX-4090"), max_model_len=8192))


@cache
def _times(table: str) -> dict[tuple[str, int], float]:
    """Seconds by layer and tokens (or sequences)."""
    with (FOLDER / f"{table}.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    size = "tokens" if table == "dense" else "sequences"
    return {(row["layer"], int(row[size])): float(row["time_us"]) * 1e-6 for row in rows}


@cache
def _attention() -> dict[tuple[int, int], float]:
    """Seconds of decode attention in a layer, by requests and context."""
    with (FOLDER / "attention.csv").open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["prefill_chunk"] == "0"]
    return {
        (int(row["n_decode"]), int(row["kv_decode"])): float(row["time_us"]) * 1e-6 for row in rows
    }


def kv_bandwidth_share() -> float:
    """Of decode attention with much to read."""
    points = [
        (float(batch * context * _KV_BYTES), seconds)
        for (batch, context), seconds in _attention().items()
        if batch * context >= 64 * 1024
    ]
    return _slope(points) / GPU.memory_bandwidth_bytes_per_s


def _tokens(least: int, most: int) -> list[int]:
    return [tokens for tokens in (1 << power for power in range(12)) if least <= tokens <= most]


def _slope(points: list[tuple[float, float]]) -> float:
    """Work per second, by least squares of each point's relative error in seconds."""
    work, seconds = np.array(points).T
    rates = work / seconds
    return float(rates @ rates / rates.sum())


def rtx4090_report() -> Iterator[str]:
    """Shares, and steps beside the sums of their kernels."""
    speed = ours()
    yield "\nRTX 4090 kernels (Llama-3.1-8B bf16), by least squares: share of bandwidth for weights "
    yield (
        f"  {bandwidth_share():.3f}, for the KV cache {kv_bandwidth_share():.3f}; of FLOPs "
        f"{flops_share():.3f}; a small kernel {kernel_s() * 1e6:.2f} us"
    )
    yield "  decode steps: requests, context, sum of kernels, ours without the host, error"
    for batch, context in STEPS:
        host = speed.efficiency.step_s + batch * speed.efficiency.sequence_s
        predicted = step_s(speed, concurrency=batch, context=context) - host
        kernels = decode_s(batch, context)
        yield (
            f"  {batch:>5} {context:>6} {kernels * 1000:>8.2f} ms {predicted * 1000:>8.2f} ms "
            f"{predicted / kernels - 1:>+7.1%}"
        )
