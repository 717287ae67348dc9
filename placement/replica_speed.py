"""A replica's costs: bytes, FLOPs, kernels and messages of one rank, from a candidate."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist

from placement.architecture import Architecture
from placement.calibration import Calibration, SpeedCorrection
from placement.candidate import Candidate, Device
from placement.costs import (
    NO_MESSAGE,
    Collective,
    DraftCost,
    ReplicaSpeed,
    StageSpeed,
)
from placement.efficiency import all_reduce, efficiency_of, exchange, send
from placement.fitted import FITTED, UNKNOWN, Constants, Errors
from placement.kernels import kernels_per_pass
from placement.memory import kv_layout, memory_use, stages_of
from placement.notes import weight_only
from placement.parameters import Parameters, count_parameters, rank_parameters
from placement.pipeline import whole_model
from placement.setups import SpeedSetup
from placement.weight_bytes import read_bytes


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
    efficiency = efficiency_of(candidate, constants)
    seen = _correction(candidate, efficiency.errors)
    return ReplicaSpeed(
        architecture=architecture,
        efficiency=replace(efficiency, errors=seen.errors),
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
        ttft_factor=seen.ttft,
        tpot_factor=seen.tpot,
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
    seen = _correction(candidate, UNKNOWN)
    return replace(
        last,
        efficiency=replace(last.efficiency, errors=seen.errors),
        ttft_factor=seen.ttft,
        tpot_factor=seen.tpot,
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
        calibration=Calibration(),  # what one node was seen to do is not what several do
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


def speed_setup_of(candidate: Candidate) -> SpeedSetup:
    """What has to be alike for another engine's speed to be that of `candidate`."""
    names = [candidate.device.gpu.name]
    if candidate.stage_nodes:
        stages = range(candidate.pipeline_parallel_size)
        names = [candidate.stage_devices(stage)[0].gpu.name for stage in stages]
    return SpeedSetup(
        checkpoint=candidate.checkpoint.source,
        precision=candidate.precision,
        gpu="+".join(names),
        engine=candidate.engine,
        dtype=candidate.dtype,
        kv_cache_dtype=candidate.kv_cache_dtype,
        tensor_parallel_size=candidate.tensor_parallel_size,
        pipeline_parallel_size=candidate.pipeline_parallel_size,
        data_parallel_size=candidate.data_parallel_size,
        expert_parallel=candidate.expert_parallel,
        decode_context_parallel_size=candidate.decode_context_parallel_size,
        enable_eplb=candidate.enable_eplb,
        num_nodes=candidate.num_nodes,
        link=candidate.device.link if candidate.num_ranks > 1 else "",
        adapters=candidate.lora is not None,
        engine_args=shlex.join(candidate.extra_args),
    )


def _correction(candidate: Candidate, errors: Errors) -> SpeedCorrection:
    """What such engines were seen to do, where predictions alone are off by `errors`."""
    if not candidate.calibration.speeds:
        return SpeedCorrection(errors)
    return candidate.calibration.speed_correction(speed_setup_of(candidate), errors)


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
