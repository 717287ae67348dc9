"""Measured efficiencies: what of data sheets is reached, and what a step costs beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.candidate import Candidate
from placement.notes import weight_only


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a device's data sheet, and fixed costs."""

    bandwidth: float
    flops: float
    step_s: float
    layer_s: float
    expert_layer_s: float = 0.0  # per layer with routed experts, beside layer_s
    sequence_s: float = 0.0  # per request in a decode step
    request_s: float = 0.0  # from HTTP to the scheduler and back: tokens in and out


@dataclass(frozen=True, slots=True)
class Collective:
    """Cost of one collective operation on a message."""

    latency_s: float = 0.0
    s_per_byte: float = 0.0

    def seconds(self, message_bytes: float) -> float:
        """For a message of that size."""
        return self.latency_s + self.s_per_byte * message_bytes


NO_MESSAGE = Collective()

# Shares of bandwidth and FLOPs: kernel tables of A100, H100, L40S and RTX 4090 (PLANNING.md); Volta
# and Blackwell are guesses. Hopper's bandwidth, FP8 FLOPs and 35 us a layer are fitted, with the
# all-reduce, to 45 runs of Llama-70B FP8 on H100 and to nothing else: 4.7% mean error of TPOT there,
# 4 to 12% for DeepSeek-R1, MiniMax-M2.5 and gpt-oss. CPU: from a 14 M Mixtral, uncalibrated.
_GPU_COSTS = {"step_s": 0.5e-3, "layer_s": 35e-6, "request_s": 0.03}
_EFFICIENCY: Mapping[str, Efficiency] = {
    "Volta": Efficiency(0.70, 0.60, step_s=1e-3, layer_s=50e-6, request_s=0.03),
    "Ampere": Efficiency(0.72, 0.65, **_GPU_COSTS),
    "Ada": Efficiency(0.82, 0.60, **_GPU_COSTS),
    "Hopper": Efficiency(0.85, 0.60, **_GPU_COSTS),
    "Blackwell": Efficiency(0.75, 0.60, **_GPU_COSTS),
    "CPU": Efficiency(0.5, 0.3, step_s=3e-3, layer_s=0.5e-3, sequence_s=0.4e-3),
}
_EXPERT_LAYER_S = 30e-6  # routing, sorting and gathering: 30 to 50 us in kernel tables
_FP8_FLOPS = 0.85  # of the share that 16 bits reach: 0.62-0.70 against 0.77-0.81 on H100
_EXPERT_FLOPS = 0.6  # the same of small experts' matrices
_FOUR_BIT_BANDWIDTH = 0.75  # unpacking AWQ and GPTQ: a guess; 0.57 in one old run of Llama-70B

# Latency of a small message, and the share of the link's bandwidth that a large one reaches.
_LINKS: Mapping[str, tuple[float, float]] = {
    "nvlink": (4e-6, 0.7),
    "pcie": (15e-6, 0.5),
    "pcie-no-p2p": (25e-6, 0.3),
    "host": (200e-6, 1.0),
}
_ALL_REDUCE_DOUBLING_S = 4e-6  # for each doubling of the ranks
_HOST_BYTES_PER_S = 2e9  # gloo through shared memory
_NETWORK_LATENCY_S = 40e-6
_NETWORK_BYTES_PER_S = 12.5e9  # 100 Gbit/s a node where nothing is told


def efficiency_of(candidate: Candidate) -> Efficiency:
    """Of the candidate's device in its precision."""
    gpu, precision = candidate.device.gpu, candidate.checkpoint.precision
    base = _EFFICIENCY.get(gpu.architecture, _EFFICIENCY["Hopper"])
    if precision in ("fp8", "nvfp4") and not weight_only(candidate):
        base = replace(base, flops=base.flops * _FP8_FLOPS)
    if precision in ("awq", "gptq"):
        base = replace(base, bandwidth=base.bandwidth * _FOUR_BIT_BANDWIDTH)
    if candidate.architecture.moe is not None and not candidate.device.is_cpu:
        flops = base.flops * _EXPERT_FLOPS
        base = replace(base, flops=flops, expert_layer_s=_EXPERT_LAYER_S)
    return base


def all_reduce(candidate: Candidate) -> Collective:
    """Of a tensor-parallel group: a ring sends each byte 2 (n - 1) / n times."""
    ranks = candidate.tensor_parallel_size
    if ranks == 1:
        return NO_MESSAGE
    latency, bandwidth = _link(candidate, across_nodes=ranks > candidate.device.gpus_per_node)
    latency += _ALL_REDUCE_DOUBLING_S * math.log2(ranks)
    return Collective(latency, 2 * (ranks - 1) / ranks / bandwidth)


def send(candidate: Candidate) -> Collective:
    """From one pipeline stage to the next."""
    if candidate.pipeline_parallel_size == 1:
        return NO_MESSAGE
    latency, bandwidth = _link(candidate, across_nodes=candidate.num_nodes > 1)
    return Collective(latency, 1 / bandwidth)


def exchange(candidate: Candidate) -> Collective:
    """Of tokens between data-parallel copies before and after their experts: gather and scatter."""
    copies, device = candidate.data_parallel_size, candidate.device
    if copies == 1 or candidate.architecture.moe is None:
        return NO_MESSAGE
    ranks = copies * candidate.tensor_parallel_size
    latency, bandwidth = _link(candidate, across_nodes=ranks > device.gpus_per_node)
    return Collective(2 * latency, 2 * (copies - 1) / bandwidth)


def _link(candidate: Candidate, *, across_nodes: bool) -> tuple[float, float]:
    """Latency, and bytes per second that are reached."""
    gpu, device = candidate.device.gpu, candidate.device
    if across_nodes:
        return _NETWORK_LATENCY_S, device.inter_node_bytes_per_s or _NETWORK_BYTES_PER_S
    latency, share = _LINKS[device.link]
    bandwidth = {"nvlink": gpu.nvlink_bytes_per_s, "host": _HOST_BYTES_PER_S}.get(
        device.link, gpu.pcie_bytes_per_s
    )
    return latency, (bandwidth if bandwidth > 0 else _HOST_BYTES_PER_S) * share
