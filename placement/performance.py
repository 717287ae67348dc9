"""How fast a replica is: a roofline with measured efficiencies, fixed costs and collectives.

A decode step takes t0 + layers x t_layer + max(weights / bandwidth, FLOPs / peak) + KV reads +
two all-reduces per layer. A mixture of experts reads the experts that its batch chooses, on average
E x (1 - (1 - k/E)^tokens). Prefill is FLOPs-bound. Between two tokens of a request, the prefills of
those that arrive meanwhile are waited for: TPOT = step + (concurrency - 1) / output x prefill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from placement.architecture import Architecture
from placement.candidate import Candidate
from placement.memory import kv_layout
from placement.parameters import count_parameters, rank_parameters
from placement.plan import Prediction
from placement.weight_bytes import weights_bytes


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica is asked to do at once."""

    concurrency: int
    input_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What of a device's data sheet is reached, and what a step costs beside it."""

    bandwidth: float
    flops: float
    step_s: float
    layer_s: float
    sequence_s: float = 0.0  # per request in a decode step


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """A candidate's costs, from which every prediction follows."""

    architecture: Architecture
    efficiency: Efficiency
    bandwidth_bytes_per_s: float
    flops: float  # of one rank, peak at the precision that it computes in
    always_read_bytes: float  # of one rank, per step
    expert_bytes: float  # of one rank, all routed experts
    flops_per_token: float  # of one rank
    attention_flops: float  # of one rank, per token and token of context
    kv_bytes_per_token: int
    all_reduce_latency_s: float
    all_reduce_s_per_byte: float
    max_num_batched_tokens: int


# Shares of bandwidth and FLOPs: kernel tables of A100, H100, L40S and RTX 4090; Volta and Blackwell
# are guesses. 40 us a layer fits Llama-70B on H100. CPU: from a 14 M Mixtral, uncalibrated.
_EFFICIENCY: Mapping[str, Efficiency] = {
    "Volta": Efficiency(bandwidth=0.70, flops=0.60, step_s=1e-3, layer_s=50e-6),
    "Ampere": Efficiency(bandwidth=0.72, flops=0.70, step_s=0.5e-3, layer_s=40e-6),
    "Ada": Efficiency(bandwidth=0.82, flops=0.60, step_s=0.5e-3, layer_s=40e-6),
    "Hopper": Efficiency(bandwidth=0.80, flops=0.60, step_s=0.5e-3, layer_s=40e-6),
    "Blackwell": Efficiency(bandwidth=0.75, flops=0.60, step_s=0.5e-3, layer_s=40e-6),
    "CPU": Efficiency(bandwidth=0.5, flops=0.3, step_s=3e-3, layer_s=0.5e-3, sequence_s=0.4e-3),
}
# Latency of a small all-reduce, and the share of the link's bandwidth that a large one reaches.
_LINKS: Mapping[str, tuple[float, float]] = {
    "nvlink": (6e-6, 0.7),
    "pcie": (15e-6, 0.5),
    "pcie-no-p2p": (25e-6, 0.3),
    "host": (200e-6, 1.0),
}
_HOST_BYTES_PER_S = 2e9  # gloo through shared memory


def replica_speed(candidate: Candidate) -> ReplicaSpeed:
    """The costs of one replica of a candidate."""
    architecture, gpu = candidate.architecture, candidate.device.gpu
    ranks, precision = candidate.tensor_parallel_size, candidate.checkpoint.precision
    rank = rank_parameters(
        architecture, tensor_parallel_size=ranks, expert_parallel=candidate.expert_parallel
    )
    bytes_per_weight = weights_bytes(candidate) / rank.total
    unread = rank.vision if architecture.tied_embeddings else rank.vision + rank.embedding
    flops = gpu.bf16_flops
    if precision == "fp8" and gpu.fp8_flops:
        flops = gpu.fp8_flops
    elif precision == "nvfp4" and gpu.fp4_flops:
        flops = gpu.fp4_flops
    latency, seconds_per_byte = _all_reduce(candidate)
    return ReplicaSpeed(
        architecture=architecture,
        efficiency=_EFFICIENCY.get(gpu.architecture, _EFFICIENCY["Hopper"]),
        bandwidth_bytes_per_s=gpu.memory_bandwidth_bytes_per_s,
        flops=flops,
        always_read_bytes=(rank.total - unread - rank.experts) * bytes_per_weight,
        expert_bytes=rank.experts * bytes_per_weight,
        flops_per_token=2 * _working_parameters(architecture) / ranks,
        attention_flops=_attention_flops(architecture) / ranks,
        kv_bytes_per_token=kv_layout(candidate).bytes_per_token,
        all_reduce_latency_s=latency,
        all_reduce_s_per_byte=seconds_per_byte,
        max_num_batched_tokens=candidate.max_num_batched_tokens,
    )


def step_s(speed: ReplicaSpeed, *, concurrency: int, context: float) -> float:
    """Seconds of one decode step of `concurrency` requests with `context` tokens each."""
    window = speed.architecture.sliding_window
    seen = context if window is None else min(context, window)
    kv = concurrency * seen * speed.kv_bytes_per_token
    read = (_weights_read(speed, concurrency) + kv) / (
        speed.bandwidth_bytes_per_s * speed.efficiency.bandwidth
    )
    flops = concurrency * (speed.flops_per_token + seen * speed.attention_flops)
    compute = flops / (speed.flops * speed.efficiency.flops)
    sequences = concurrency * speed.efficiency.sequence_s
    return _fixed_s(speed, concurrency) + sequences + max(read, compute)


def prefill_s(speed: ReplicaSpeed, tokens: float) -> float:
    """Seconds from the start of a prompt of `tokens` to its first token, nothing else running."""
    chunks = max(1, -(-int(tokens) // speed.max_num_batched_tokens))
    window = speed.architecture.sliding_window
    seen = tokens / 2 if window is None else min(tokens / 2, window)
    flops = tokens * (speed.flops_per_token + seen * speed.attention_flops)
    compute = flops / (speed.flops * speed.efficiency.flops)
    per_chunk = tokens / chunks
    read = _weights_read(speed, per_chunk) / (
        speed.bandwidth_bytes_per_s * speed.efficiency.bandwidth
    )
    return chunks * _fixed_s(speed, per_chunk) + max(compute, chunks * read)


def predict(speed: ReplicaSpeed, load: Load) -> Prediction:
    """Means under a steady `load`: each request is followed by the next."""
    prefill = prefill_s(speed, load.input_tokens)
    context = load.input_tokens + load.output_tokens / 2
    step = step_s(speed, concurrency=load.concurrency, context=context)
    others = load.concurrency - 1
    tpot = step + others / max(load.output_tokens, 1.0) * prefill
    waiting = step / 2 if others else 0.0
    # On average a prompt waits for half of another one when prefills take `busy` of the time.
    busy = min(1.0, others * prefill / (load.output_tokens * tpot + prefill)) if others else 0.0
    ttft = prefill + waiting + busy * prefill / 2
    duration = ttft + max(load.output_tokens - 1, 0.0) * tpot
    return Prediction(
        ttft_s=ttft,
        tpot_ms=tpot * 1000,
        output_tokens_per_s=load.concurrency * load.output_tokens / duration,
    )


def requests_per_s(prediction: Prediction, load: Load) -> float:
    """Rate at which a replica finishes requests under `load`."""
    return prediction.output_tokens_per_s / load.output_tokens


def _fixed_s(speed: ReplicaSpeed, tokens: float) -> float:
    layers = speed.architecture.num_layers
    message = tokens * speed.architecture.hidden_size * 2
    collectives = speed.all_reduce_latency_s + message * speed.all_reduce_s_per_byte
    efficiency = speed.efficiency
    return efficiency.step_s + layers * (efficiency.layer_s + 2 * collectives)


def _weights_read(speed: ReplicaSpeed, tokens: float) -> float:
    moe = speed.architecture.moe
    if moe is None:
        return speed.always_read_bytes
    idle = math.pow(1 - moe.num_experts_per_token / moe.num_experts, tokens)
    return speed.always_read_bytes + speed.expert_bytes * (1 - idle)


def _working_parameters(architecture: Architecture) -> int:
    parameters = count_parameters(architecture)
    looked_up = 0 if architecture.tied_embeddings else parameters.embedding
    return parameters.language - looked_up - parameters.idle_experts


def _attention_flops(architecture: Architecture) -> float:
    """Per token and token of context: scores and weighted values, 2 FLOPs a multiplication."""
    mla, width = architecture.mla, 2 * architecture.head_dim
    if mla is not None:
        width = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    return 2.0 * architecture.num_layers * architecture.num_heads * width


def _all_reduce(candidate: Candidate) -> tuple[float, float]:
    """Latency, and seconds per byte of message: a ring sends each byte 2 (n - 1) / n times."""
    ranks, gpu, link = candidate.tensor_parallel_size, candidate.device.gpu, candidate.device.link
    if ranks == 1:
        return 0.0, 0.0
    latency, share = _LINKS[link]
    bandwidth = {"nvlink": gpu.nvlink_bytes_per_s, "host": _HOST_BYTES_PER_S}.get(
        link, gpu.pcie_bytes_per_s
    )
    if bandwidth <= 0:
        bandwidth = _HOST_BYTES_PER_S
    return latency, 2 * (ranks - 1) / ranks / (bandwidth * share)
