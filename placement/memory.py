"""Where a rank's memory goes: weights, activations, KV cache; the worst pipeline stage decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.adapters import adapter_bytes
from placement.architecture import Architecture
from placement.balancing import balance_bytes
from placement.calibration import Correction
from placement.candidate import GIB, Candidate
from placement.expert_exchange import exchange_bytes
from placement.kv_cache import (
    KvCache,
    KvLayout,
    kv_block_size,
    kv_bytes_per_token,
    kv_cache,
    layer_groups,
)
from placement.pipeline import Stage, pipeline_stages
from placement.plan import GpuMemory
from placement.setups import setup_of
from placement.vllm_release import release
from placement.weight_bytes import loaded_architecture, weights_bytes

_MLA_WORKSPACE_TOKENS = 64 * 1024
_PROCESS_BYTES = int(1.8 * GIB)  # a vLLM worker on a CPU before it loads anything


@dataclass(frozen=True, slots=True)
class StageMemory:
    """One rank of a pipeline stage, and the blocks that fit into what is left of its memory."""

    stage: Stage
    per_gpu: GpuMemory
    kv: KvCache
    missing_bytes: int  # by how much weights and overheads exceed the budget; 0: they fit


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The rank with least room, and the cache of the replica, which follows from it."""

    per_gpu: GpuMemory
    kv: KvCache
    missing_bytes: int
    stages: tuple[StageMemory, ...]
    worst_stage: int


def memory_use(candidate: Candidate) -> MemoryUse:
    """Split the memory of the rank that decides.

    All workers are cut to the smallest number of blocks (v1/core/kv_cache_utils.py
    get_kv_cache_configs), so the stage with the fewest, or the one that misses most, decides; among
    equals (CPUs, where the cache is a fixed budget) the heaviest.
    """
    parts = tuple(stage_memory(candidate, stage) for stage in stages_of(candidate))
    worst = min(
        parts,
        key=lambda part: (-part.missing_bytes, part.kv.num_blocks, -part.per_gpu.weights_bytes),
    )
    return MemoryUse(
        per_gpu=worst.per_gpu,
        kv=worst.kv,
        missing_bytes=worst.missing_bytes,
        stages=parts,
        worst_stage=worst.stage.index,
    )


def stages_of(candidate: Candidate) -> tuple[Stage, ...]:
    """The candidate's pipeline stages."""
    return pipeline_stages(
        candidate.architecture.num_layers,
        candidate.pipeline_parallel_size,
        candidate.layer_partition,
    )


def activation_bytes(candidate: Candidate, stage: Stage | None = None) -> int:
    """Peak of one rank of `stage` beside weights and cache, as vLLM's profile run finds it.

    The largest of three moments: the forward pass over max_num_batched_tokens, at its widest in
    the feed-forward (gate, up and their product, and three residual-wide buffers: 108 KiB a token
    for Llama-8B, as vllm issue 10517 shows); on the last stage, the sampler on max_num_seqs rows
    while hidden states and residual are kept; on a stage with a vision tower, images of as many
    tokens. Latent attention adds its chunked-prefill workspace, data-parallel copies what their
    experts work on tokens of all copies in.
    """
    stage = stage or stages_of(candidate)[-1]
    architecture, ranks = candidate.architecture, candidate.tensor_parallel_size
    constants, hidden = release(candidate.vllm_release), architecture.hidden_size
    tokens = candidate.max_num_batched_tokens
    if constants.profiles_whole_context:
        tokens = max(tokens, candidate.max_model_len)
    moe, width = architecture.moe, architecture.intermediate_size or 0
    if moe is not None:
        width = max(width, moe.num_experts_per_token * moe.expert_intermediate_size)
    size = candidate.element_bytes
    peak = tokens * (3 * width // ranks + 3 * hidden) * size
    if stage.is_last:
        sampler = constants.sampler_peak_bytes(
            max_num_seqs=min(candidate.max_num_seqs, tokens), vocab_size=architecture.vocab_size
        )
        peak = max(peak, tokens * 2 * hidden * size + sampler)
    vision = _vision_bytes(candidate, tokens) if stage.is_first else 0
    workspaces = _latent_workspace_bytes(candidate) + exchange_bytes(candidate, stage)
    return max(peak, vision) + workspaces


def kv_layout(candidate: Candidate, stage: Stage | None = None) -> KvLayout:
    """How a stage's KV cache is cut; without a stage, that of the stage with most layers.

    A sliding window also keeps the tokens of steps in flight: one for each pipeline stage, and one
    more on GPUs, where scheduling overlaps (config/vllm.py max_in_flight_tokens,
    max_concurrent_batches; the stages' part is what a CPU logs with two of them).
    """
    architecture = candidate.architecture
    steps = candidate.pipeline_parallel_size + (0 if candidate.device.is_cpu else 1)
    stage = stage or max(stages_of(candidate), key=lambda each: each.num_layers)
    full, windowed, size = layer_groups(architecture)
    return KvLayout(
        bytes_per_token=kv_bytes_per_token(
            architecture,
            tensor_parallel_size=candidate.tensor_parallel_size,
            element_bytes=candidate.kv_element_bytes,
            num_layers=max(1, -(-size * stage.num_layers // architecture.num_layers)),
        ),
        block_size=kv_block_size(
            architecture,
            candidate.device.gpu,
            kv_element_bytes=candidate.kv_element_bytes,
            amx=candidate.device.amx,
        ),
        sliding_window=architecture.sliding_window if windowed else None,
        max_in_flight_tokens=candidate.max_num_batched_tokens * steps,
        num_full_groups=full,
        num_window_groups=windowed,
        decode_context_parallel_size=candidate.decode_context_parallel_size,
    )


def stage_memory(candidate: Candidate, stage: Stage) -> StageMemory:
    """Split the memory of one rank of `stage`.

    On a GPU vLLM takes ceil(total x gpu_memory_utilization) and gives the KV cache what weights,
    non-torch memory, activations and CUDA graphs leave (v1/worker/gpu_worker.py
    determine_available_memory). On a CPU the cache is a fixed budget (cpu_worker.py), and it must
    fit beside the weights and the process. What was measured in this setup corrects both.
    """
    correction = _correction(candidate)
    weights = max(0, weights_bytes(candidate, stage) + correction.weights_bytes)
    adapters = adapter_bytes(candidate, stage)
    total = min(device.memory_bytes or 0 for device in candidate.stage_devices(stage.index))
    if candidate.device.is_cpu:
        wanted = candidate.device.kv_cache_budget_bytes or 0
        activation, graphs, non_torch = 0, 0, _PROCESS_BYTES
        left = total - weights - adapters - non_torch
        missing = max(0, wanted - left)
        available = wanted if missing == 0 else 0
    else:
        constants = release(candidate.vllm_release)
        activation = max(0, activation_bytes(candidate, stage) + correction.other_bytes)
        activation += balance_bytes(candidate, stage)
        graphs = constants.cuda_graph_bytes
        non_torch = constants.non_torch_bytes(
            num_stages=candidate.pipeline_parallel_size,
            ranks_per_stage=candidate.tensor_parallel_size * candidate.data_parallel_size,
        )
        budget = math.ceil(total * candidate.gpu_memory_utilization)
        left = budget - weights - adapters - non_torch - activation - graphs
        missing, available = max(0, -left), max(0, left)
    used = weights + adapters + activation + non_torch + graphs + available
    return StageMemory(
        stage=stage,
        per_gpu=GpuMemory(
            total_bytes=total,
            weights_bytes=weights,
            adapter_bytes=adapters,
            activation_bytes=activation,
            non_torch_bytes=non_torch,
            cuda_graph_bytes=graphs,
            kv_cache_bytes=available,
            headroom_bytes=max(0, total - used),
        ),
        kv=kv_cache(
            kv_layout(candidate, stage),
            available_bytes=available,
            max_model_len=candidate.max_model_len,
            data_parallel_size=candidate.data_parallel_size,
        ),
        missing_bytes=missing,
    )


def _correction(candidate: Candidate) -> Correction:
    """What an engine in just this setup was seen to need more or less."""
    if not candidate.calibration.observations:
        return Correction()
    setup = setup_of(
        candidate, checkpoint=candidate.checkpoint.source, gpu=candidate.device.gpu.name
    )
    return candidate.calibration.correction(setup)


def _vision_bytes(candidate: Candidate, tokens: int) -> int:
    """The vision tower at work on images that make `tokens` tokens, at least one image."""
    vision = loaded_architecture(candidate).vision
    if vision is None:
        return 0
    side = vision.image_size // vision.patch_size
    merged = vision.spatial_merge_size**2
    images = max(1, tokens * merged // side**2)
    patches = images * side**2
    width = 3 * vision.intermediate_size // candidate.tensor_parallel_size + 3 * vision.hidden_size
    outputs = patches // merged * candidate.architecture.hidden_size
    return (patches * width + outputs) * candidate.element_bytes


def _latent_workspace_bytes(candidate: Candidate) -> int:
    """MLA's chunked prefill: latents and their expansion to keys and values of a local head.

    mla_attention.py determine_chunked_prefill_workspace_size: up to 64k tokens.
    """
    architecture: Architecture = candidate.architecture
    mla = architecture.mla
    if mla is None:
        return 0
    slots = 4 * candidate.max_num_seqs * kv_layout(candidate).block_size
    tokens = min(max(8 * candidate.max_model_len, slots), _MLA_WORKSPACE_TOKENS)
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    heads = architecture.num_heads // candidate.tensor_parallel_size
    expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return tokens * (latent + expanded) * candidate.element_bytes
