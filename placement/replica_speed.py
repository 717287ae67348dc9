"""A replica's costs: bytes, FLOPs, kernels and messages of one rank, from a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

from placement.architecture import Architecture
from placement.calibration import setup_of
from placement.candidate import Candidate, Device
from placement.efficiency import (
    NO_MESSAGE,
    Collective,
    Efficiency,
    all_reduce,
    efficiency_of,
    exchange,
    send,
)
from placement.fitted import FITTED, UNKNOWN, Constants, Errors
from placement.kernels import kernels_per_pass
from placement.memory import kv_layout, memory_use, stages_of
from placement.notes import weight_only
from placement.parameters import Parameters, count_parameters, rank_parameters
from placement.pipeline import whole_model
from placement.weight_bytes import read_bytes


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What a draft model costs a rank for each token that it proposes."""

    read_bytes: float
    kernels: int
    messages: int  # all-reduces


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """A pipeline stage: its share of the model's layers, and how fast its GPUs would do all."""

    speed: ReplicaSpeed
    share: float
    is_last: bool
    send: Collective  # of its output
    count: int = 1  # of such stages


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """A candidate's costs, from which every prediction follows. A rank's are of all its layers."""

    architecture: Architecture
    efficiency: Efficiency
    bandwidth_bytes_per_s: float
    flops: float  # of one rank, peak at the precision that it computes in
    flops_16_bit: float  # of one rank, peak
    always_read_bytes: float  # of one rank, per step
    expert_bytes: float  # of one rank, all routed experts
    flops_per_token: float  # of one rank
    prefill_flops_per_token: float  # of one rank: without the head, which only the last token needs
    expert_flops_per_token: float  # of one rank, a part of both
    attention_flops: float  # of one rank, per token and token of context
    kv_bytes_per_token: int
    kernels: int  # of one pass
    all_reduces: int  # of one pass, of a token's hidden state
    all_reduce: Collective
    max_num_batched_tokens: int
    max_num_seqs: int  # of the replica
    kv_cache_tokens: int  # of the replica
    draft: DraftCost
    small_messages: int = 0  # all-reduces of a few bytes
    expert_spread: float = (
        0.0  # of the fullest rank's experts over the mean, in standard deviations
    )
    experts_per_rank: float = 1.0
    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    stage_imbalance: float = 1.0  # layers of the longest stage over those of an average one
    last_stage_share: float = 1.0  # of all layers, beside the head
    head_bytes: float = 0.0  # of one rank, a part of always_read_bytes
    send: Collective = NO_MESSAGE
    exchange: Collective = NO_MESSAGE
    stages: tuple[StageSpeed, ...] = ()  # of a pipeline over nodes; else its stages are alike
    ttft_factor: float = 1.0  # by which such engines were slower than predicted
    tpot_factor: float = 1.0


def replica_speed(candidate: Candidate, *, constants: Constants = FITTED) -> ReplicaSpeed:
    """The costs of one replica of a candidate."""
    if candidate.stage_nodes:
        kinds = dict.fromkeys(candidate.rank_devices)
        alone = {device: speed_alone(candidate, device, constants) for device in kinds}
        return recut(spanning_speed(candidate, alone), candidate)
    architecture, gpu = candidate.architecture, candidate.device.gpu
    ranks, copies = candidate.tensor_parallel_size, candidate.data_parallel_size
    layers = architecture.num_layers
    always, experts = read_bytes(candidate, _rank(candidate))
    counted = count_parameters(architecture)
    working = _working_parameters(architecture, counted)
    stages = [stage.num_layers for stage in stages_of(candidate)]
    expert_ranks = ranks * copies if candidate.expert_parallel else 1
    kernels = kernels_per_pass(
        architecture, quantised_activations=_quantises_activations(candidate)
    )
    efficiency, ttft_factor, tpot_factor = _calibrated(candidate, constants)
    return ReplicaSpeed(
        architecture=architecture,
        efficiency=efficiency,
        bandwidth_bytes_per_s=gpu.memory_bandwidth_bytes_per_s,
        flops=_peak_flops(candidate),
        flops_16_bit=gpu.bf16_flops,
        always_read_bytes=always,
        expert_bytes=experts,
        flops_per_token=2 * working / ranks,
        prefill_flops_per_token=2 * (working - _head(counted)) / ranks,
        expert_flops_per_token=2 * (counted.experts - counted.idle_experts) / ranks,
        attention_flops=_attention_flops(architecture) / ranks,
        kv_bytes_per_token=kv_layout(candidate, whole_model(layers)).bytes_per_context_token,
        kernels=kernels,
        all_reduces=2 * layers,
        all_reduce=all_reduce(candidate, constants),
        max_num_batched_tokens=candidate.max_num_batched_tokens,
        max_num_seqs=candidate.max_num_seqs * copies,
        kv_cache_tokens=memory_use(candidate).kv.tokens,
        draft=_draft(candidate, always, kernels),
        small_messages=layers if architecture.qk_norm_over_heads else 0,
        expert_spread=_largest_of(expert_ranks),
        experts_per_rank=_experts_per_rank(architecture, expert_ranks),
        data_parallel_size=copies,
        pipeline_parallel_size=candidate.pipeline_parallel_size,
        stage_imbalance=candidate.pipeline_parallel_size * max(stages) / layers,
        last_stage_share=stages[-1] / layers,
        head_bytes=_head(counted) / ranks * candidate.element_bytes,
        send=send(candidate),
        exchange=exchange(candidate),
        ttft_factor=ttft_factor,
        tpot_factor=tpot_factor,
    )


def spanning_speed(candidate: Candidate, alone: Mapping[Device, ReplicaSpeed]) -> ReplicaSpeed:
    """The costs of a replica whose stages stand on several nodes, each stage told by itself.

    Every stage works as its own GPUs do, which are `speed_alone` of each device; what is not of
    layers is the last one's. The cache is left for `recut` to say.
    """
    stages = stages_of(candidate)
    layers = candidate.architecture.num_layers
    parts = []
    for stage in stages:
        device = candidate.stage_devices(stage.index)[0]
        parts.append(
            StageSpeed(
                speed=alone[device],
                share=stage.num_layers / layers,
                is_last=stage.is_last,
                send=NO_MESSAGE if stage.is_last else _send(candidate, stage.index),
            )
        )
    last = parts[-1].speed
    return replace(
        last,
        efficiency=replace(last.efficiency, errors=UNKNOWN),
        pipeline_parallel_size=candidate.pipeline_parallel_size,
        stages=tuple(parts),
    )


def recut(speed: ReplicaSpeed, candidate: Candidate) -> ReplicaSpeed:
    """The costs of `candidate`, which differs from that of `speed` in its split and context only.

    `speed` is a `spanning_speed`; of stages that are alike one is left, with their count.
    """
    layers = candidate.architecture.num_layers
    alike: dict[tuple[int, int, bool, Collective], list[StageSpeed]] = {}
    for part, stage in zip(speed.stages, stages_of(candidate), strict=True):
        key = (id(part.speed), stage.num_layers, part.is_last, part.send)
        alike.setdefault(key, []).append(replace(part, share=stage.num_layers / layers))
    return replace(
        speed,
        kv_cache_tokens=memory_use(candidate).kv.tokens,
        stages=tuple(replace(parts[0], count=len(parts)) for parts in alike.values()),
    )


def speed_alone(
    candidate: Candidate, device: Device, constants: Constants = FITTED
) -> ReplicaSpeed:
    """How fast a tensor-parallel group on `device` would be if it had all layers."""
    whole = replace(
        candidate,
        device=device,
        num_nodes=1,
        pipeline_parallel_size=1,
        layer_partition=(),
        rank_devices=(),
        stage_nodes=(),
    )
    return replica_speed(whole, constants=constants)


def _send(candidate: Candidate, stage: int) -> Collective:
    """From a stage to the next, over the slower of their links."""
    across = candidate.stage_nodes[stage] != candidate.stage_nodes[stage + 1]
    ends = (candidate.stage_devices(stage)[0], candidate.stage_devices(stage + 1)[0])
    links = [
        send(replace(candidate, device=device, num_nodes=2 if across else 1)) for device in ends
    ]
    return max(links, key=lambda link: link.s_per_byte)


def with_constants(speed: ReplicaSpeed, candidate: Candidate, constants: Constants) -> ReplicaSpeed:
    """The same replica of `candidate` under other constants."""
    return replace(
        speed,
        efficiency=efficiency_of(candidate, constants),
        all_reduce=all_reduce(candidate, constants),
    )


def _calibrated(candidate: Candidate, constants: Constants) -> tuple[Efficiency, float, float]:
    """Efficiency with the errors that are left, and factors of TTFT and TPOT."""
    efficiency = efficiency_of(candidate, constants)
    if not candidate.calibration.speeds:
        return efficiency, 1.0, 1.0
    setup = setup_of(
        candidate, checkpoint=candidate.checkpoint.source, gpu=candidate.device.gpu.name
    )
    seen = candidate.calibration.speed(setup)
    if seen is None:
        return efficiency, 1.0, 1.0
    ttft, ttft_error = seen.ttft.corrected(efficiency.errors.ttft)
    tpot, tpot_error = seen.tpot.corrected(efficiency.errors.tpot)
    return replace(efficiency, errors=Errors(tpot_error, ttft_error)), ttft, tpot


def _rank(candidate: Candidate) -> Parameters:
    return rank_parameters(
        candidate.architecture,
        tensor_parallel_size=candidate.tensor_parallel_size,
        expert_parallel=candidate.expert_parallel,
        data_parallel_size=candidate.data_parallel_size,
    )


def _draft(candidate: Candidate, always: float, kernels: int) -> DraftCost:
    """Of EAGLE: one layer like the target's dense part, and the target's head.

    A draft of a known size is read whole, on each rank a share.
    """
    architecture = candidate.architecture
    sizes = [draft.size_bytes for draft in candidate.model.drafts if draft.size_bytes]
    head = _head(count_parameters(architecture)) * 2 / candidate.tensor_parallel_size
    layer = always / architecture.num_layers
    if sizes:
        layer = sizes[0] / candidate.tensor_parallel_size
    return DraftCost(layer + head, -(-kernels // architecture.num_layers), messages=2)


def _largest_of(ranks: int) -> float:
    """Expected largest of as many normal numbers, in standard deviations (Blom 1958)."""
    return 0.0 if ranks == 1 else NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def _experts_per_rank(architecture: Architecture, ranks: int) -> float:
    return 1.0 if architecture.moe is None else architecture.moe.num_experts / ranks


def _quantises_activations(candidate: Candidate) -> bool:
    return candidate.checkpoint.precision in ("fp8", "nvfp4") and not weight_only(candidate)


def _peak_flops(candidate: Candidate) -> float:
    gpu, precision = candidate.device.gpu, candidate.checkpoint.precision
    if not weight_only(candidate):
        if precision == "fp8" and gpu.fp8_flops:
            return gpu.fp8_flops
        if precision == "nvfp4" and gpu.fp4_flops:
            return gpu.fp4_flops
    return gpu.bf16_flops


def _working_parameters(architecture: Architecture, parameters: Parameters) -> int:
    looked_up = 0 if architecture.tied_embeddings else parameters.embedding
    return parameters.language - looked_up - parameters.idle_experts


def _head(parameters: Parameters) -> int:
    return parameters.head or parameters.embedding


def _attention_flops(architecture: Architecture) -> float:
    """Per token and token of context: scores and weighted values, 2 FLOPs a multiplication."""
    mla, width = architecture.mla, 2 * architecture.head_dim
    if mla is not None:
        width = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    return 2.0 * architecture.num_layers * architecture.num_heads * width
