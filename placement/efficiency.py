"""Measured efficiencies: what of data sheets is reached, and what a step costs beside it.

`fitted.py` has what runs of vLLM on Hopper leave of kernels. Other generations of GPUs reach what
their kernel tables say, by the same proportion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

from placement.candidate import Candidate
from placement.catalogue import GpuType
from placement.costs import NO_MESSAGE, Collective, Efficiency
from placement.fitted import FITTED, KNOWN, UNKNOWN, Constants
from placement.notes import CUSTOM_ALL_REDUCE_RANKS, weight_only


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Shares of bandwidth and 16-bit FLOPs that matrices reach in kernel tables."""

    bandwidth: float
    flops: float
    times: float = 1.0  # of fixed costs


# AIConfigurator's tables (PLANNING.md); RTX 4090 by least squares (tests/accuracy/rtx4090.py).
_KERNELS: Mapping[str, Mapping[str, _Kernels]] = {
    "Volta": {"V100-32": _Kernels(0.70, 0.60, times=2.0)},  # a guess
    "Ampere": {"A100-80-SXM": _Kernels(0.69, 0.91)},
    "Ada": {"L40S": _Kernels(0.80, 0.65), "RTX-4090": _Kernels(0.86, 0.99)},
    # H100 0.82 and 0.79, H200 0.76 and 0.75; in engines both do equally well.
    "Hopper": {"H100-SXM": _Kernels(0.79, 0.77)},
}
# From a 14 M Mixtral, uncalibrated.
_CPU = Efficiency(
    bandwidth=0.5,
    expert_bandwidth=0.5,
    kv_bandwidth=0.5,
    flops=0.3,
    expert_flops=0.18,
    attention_flops=0.3,
    step_s=3e-3,
    kernel_s=40e-6,
    sequence_s=0.4e-3,
)
_MEASURED_PRECISIONS = frozenset({"bf16", "fp8", "mxfp4"})
_FP8_FLOPS = 0.85  # of the share that 16 bits reach: 0.62-0.70 against 0.77-0.81 on H100
_FOUR_BIT_BANDWIDTH = 0.75  # unpacking AWQ and GPTQ: a guess; 0.57 in one old run of Llama-70B

# vLLM's custom all-reduce writes to all ranks at once below these sizes (custom_all_reduce.cuh);
# above, ranks reduce a part each and gather. Bytes by ranks.
_TWO_SHOT_BYTES: Mapping[int, int] = {4: 512 * 1024, 6: 256 * 1024, 8: 256 * 1024}
# Latency of a small message, of NVLink by `fitted.py`, and the share of the link's bandwidth that a
# large one reaches. PCIe: 20, 5 and 1 of 32 GB/s at 2, 4 and 8 L40S in one table; taken to halve
# with each doubling, as other boxes lose less.
_NVLINK_SHARE = 0.7
_PCIE_LATENCY_S = 11e-6
_PCIE_SHARE, _PCIE_FALL = 0.62, 1.0
_NO_PEER_LATENCY_S, _NO_PEER_SHARE = 25e-6, 0.3
_NCCL_S: Mapping[int, float] = {1: 6e-6, 2: 9.5e-6, 3: 16e-6}  # NVLink, by doublings
_HOST_LATENCY_S = 200e-6
_ALL_REDUCE_DOUBLING_S = 4e-6  # for each doubling of the ranks
_HOST_BYTES_PER_S = 2e9  # gloo through shared memory
_NETWORK_LATENCY_S = 40e-6
_NETWORK_BYTES_PER_S = 12.5e9  # 100 Gbit/s a node where nothing is told


def efficiency_of(candidate: Candidate, constants: Constants = FITTED) -> Efficiency:
    """Of the candidate's device in its precision."""
    if candidate.device.is_cpu:
        return _CPU
    gpu, precision = candidate.device.gpu, candidate.checkpoint.precision
    hopper, kernels = _mean_of("Hopper"), _kernels_of(gpu.name, gpu.architecture)
    bandwidth = kernels.bandwidth / hopper.bandwidth
    flops = kernels.flops / hopper.flops
    efficiency = Efficiency(
        bandwidth=min(1.0, constants.weight_bandwidth * bandwidth),
        expert_bandwidth=min(1.0, constants.expert_bandwidth * bandwidth),
        kv_bandwidth=min(1.0, constants.kv_bandwidth * bandwidth),
        flops=min(1.0, constants.flops * flops),
        expert_flops=min(1.0, constants.expert_flops * flops),
        attention_flops=min(1.0, constants.attention_flops * flops),
        step_s=constants.step_s * kernels.times,
        kernel_s=constants.kernel_s * kernels.times,
        sequence_s=constants.sequence_s * kernels.times,
        request_s=constants.request_s,
        routing_evenness=constants.routing_evenness,
        together=constants.together,
        errors=KNOWN if _was_measured(candidate) else UNKNOWN,
    )
    if precision in ("fp8", "nvfp4") and not weight_only(candidate):
        return replace(efficiency, flops=efficiency.flops * _FP8_FLOPS)
    if precision in ("awq", "gptq"):
        return replace(efficiency, bandwidth=efficiency.bandwidth * _FOUR_BIT_BANDWIDTH)
    return efficiency


def bandwidth_beside_hopper(gpu: GpuType) -> float:
    """The share of its bandwidth that a GPU type's kernels reach, over Hopper's share."""
    return _kernels_of(gpu.name, gpu.architecture).bandwidth / _mean_of("Hopper").bandwidth


@cache
def _kernels_of(gpu: str, generation: str) -> _Kernels:
    """Of the GPU type, or the mean of its generation, or of all generations but the oldest."""
    if generation in _KERNELS:
        return _KERNELS[generation].get(gpu) or _mean_of(generation)
    means = [_mean_of(each) for each in _KERNELS if each != "Volta"]
    return _Kernels(fmean(m.bandwidth for m in means), fmean(m.flops for m in means))


@cache
def _mean_of(generation: str) -> _Kernels:
    known = list(_KERNELS[generation].values())
    return _Kernels(
        bandwidth=fmean(each.bandwidth for each in known),
        flops=fmean(each.flops for each in known),
        times=fmean(each.times for each in known),
    )


def _was_measured(candidate: Candidate) -> bool:
    """Whether runs like it were predicted without being fitted to: tensor parallel on Hopper."""
    ranks = candidate.tensor_parallel_size
    return (
        candidate.device.gpu.architecture == "Hopper"
        and candidate.checkpoint.precision in _MEASURED_PRECISIONS
        and candidate.num_ranks == ranks
        and (ranks == 1 or (candidate.device.link == "nvlink" and candidate.num_nodes == 1))
    )


def all_reduce(candidate: Candidate, constants: Constants = FITTED) -> Collective:
    """Of a tensor-parallel group: a ring sends each byte 2 (n - 1) / n times."""
    ranks = candidate.tensor_parallel_size
    if ranks == 1:
        return NO_MESSAGE
    across = ranks > candidate.device.gpus_per_node
    latency, bandwidth = _link(candidate, ranks=ranks, across_nodes=across)
    s_per_byte = 2 * (ranks - 1) / ranks / bandwidth
    doublings = math.log2(ranks)
    if candidate.device.link != "nvlink" or across:
        return Collective(latency + _ALL_REDUCE_DOUBLING_S * (doublings - 1), s_per_byte)
    if ranks not in CUSTOM_ALL_REDUCE_RANKS:
        return Collective(_NCCL_S.get(math.ceil(doublings), _NCCL_S[3]), s_per_byte)
    return Collective(
        constants.all_reduce_s + constants.all_reduce_doubling_s * (doublings - 1),
        s_per_byte,
        two_shot_bytes=_TWO_SHOT_BYTES.get(ranks),
        two_shot_s=constants.two_shot_s,
    )


def send(candidate: Candidate) -> Collective:
    """From one pipeline stage to the next."""
    if candidate.pipeline_parallel_size == 1:
        return NO_MESSAGE
    across = candidate.num_nodes > candidate.data_parallel_size  # else a node holds whole copies
    latency, bandwidth = _link(candidate, ranks=2, across_nodes=across)
    return Collective(latency, 1 / bandwidth)


def exchange(candidate: Candidate) -> Collective:
    """Of the tokens of data-parallel copies, before and after their experts; per byte of one copy's.

    All-gather and reduce-scatter: rings, in which what leaves a GPU, and what leaves a node by all
    of its network cards together, are the tokens of all copies but one share. With whole experts on
    their ranks, the ranks of a tensor-parallel group have a part of the copy's tokens each (vLLM's
    sequence parallel mixtures), otherwise each has all of them and a ring of its own. Activations
    that the experts want in 8 bits are gathered so.
    """
    copies, device = candidate.data_parallel_size, candidate.device
    if copies == 1 or candidate.architecture.moe is None:
        return NO_MESSAGE
    ranks = copies * candidate.tensor_parallel_size
    members, rings = ranks, 1
    if not candidate.expert_parallel:
        members, rings = copies, candidate.tensor_parallel_size
    eight_bits = candidate.checkpoint.precision in ("fp8", "nvfp4") and not weight_only(candidate)
    sent = copies * (members - 1) / members * ((0.5 if eight_bits else 1.0) + 1.0)
    latency, bandwidth = _link(candidate, ranks=ranks, across_nodes=False)
    if candidate.num_nodes == 1 and ranks <= device.gpus_per_node:
        return Collective(2 * latency, sent / bandwidth)
    latency, network = _link(candidate, ranks=ranks, across_nodes=True)
    latency += _ALL_REDUCE_DOUBLING_S * (math.log2(ranks) - 1)
    return Collective(2 * latency, max(sent / bandwidth, rings * sent / network))


def _link(candidate: Candidate, *, ranks: int, across_nodes: bool) -> tuple[float, float]:
    """Latency, and bytes per second that are reached."""
    gpu, device = candidate.device.gpu, candidate.device
    if across_nodes:
        return _NETWORK_LATENCY_S, device.inter_node_bytes_per_s or _NETWORK_BYTES_PER_S
    if device.link == "nvlink":
        latency = _NCCL_S.get(math.ceil(math.log2(ranks)), _NCCL_S[3])
        return latency, (gpu.nvlink_bytes_per_s or _HOST_BYTES_PER_S) * _NVLINK_SHARE
    if device.link == "host":
        return _HOST_LATENCY_S, _HOST_BYTES_PER_S
    bandwidth = gpu.pcie_bytes_per_s or _HOST_BYTES_PER_S
    if device.link == "pcie":
        return _PCIE_LATENCY_S, bandwidth * _PCIE_SHARE * (2 / ranks) ** _PCIE_FALL
    return _NO_PEER_LATENCY_S, bandwidth * _NO_PEER_SHARE
