"""Every way to run a fleet's model on a pool that is worth a look."""

from __future__ import annotations

import math
from dataclasses import replace

from placement.balancing import with_balance
from placement.candidate import Candidate, Device, device_of, simulated_device
from placement.catalogue import Catalogue, Checkpoint, ModelSpec
from placement.expert_exchange import batched_tokens
from placement.fleet import FleetModel
from placement.inventory import Pool
from placement.kv_cache import longest_context
from placement.memory import kv_layout, memory_use

DEFAULT_SIMULATED_GPU = "H100-SXM"
GPU_MAX_NUM_SEQS, CPU_MAX_NUM_SEQS = 256, 32
GPU_BATCHED_TOKENS, CPU_BATCHED_TOKENS = 8192, 2048
CPU_MAX_MODEL_LEN = 8192
CONTEXT_STEP = 1024  # a context that is cut down is a multiple of this


def candidates(wish: FleetModel, pool: Pool, catalogue: Catalogue) -> list[Candidate]:
    """Checkpoints x tensor parallel sizes 1, 2, 4 ... on one node of `pool`, legal or not.

    On `nodes_per_replica` nodes where the fleet says so, with a pipeline across them or, of a
    mixture of experts on GPUs, with copies of the attention and the experts over all of them.
    Where GPUs have no NVLink, pipelines of 2, 4 ... such groups too: they exchange far less.
    What the fleet leaves open is filled in: 256 requests and 8,192 tokens a step on GPUs, 32 and
    2,048 on CPUs; the model's context, on CPUs at most 8,192, cut down to what the KV cache holds;
    experts spread over the ranks of a GPU replica.
    """
    model = catalogue.model(wish.model)
    device = target_device(wish, pool, catalogue)
    found = []
    for checkpoint in wanted_checkpoints(wish, model):
        for ranks, stages, copies in _parallel_sizes(wish, model, checkpoint, device):
            candidate = filled_in(wish, model, checkpoint, device, ranks, copies=copies)
            candidate = replace(candidate, pipeline_parallel_size=stages)
            candidate = replace(candidate, calibration=catalogue.calibration)
            if wish.max_model_len is None:
                candidate = with_context_that_fits(candidate, at_least=longest_request(wish))
            found.append(candidate)
    return found


def target_device(wish: FleetModel, pool: Pool, catalogue: Catalogue) -> Device:
    """What the engine believes to run on: the pool's GPU, or the one simulated on a CPU."""
    gpu = catalogue.gpu(pool.gpu)
    device = device_of(pool, gpu)
    if wish.engine == "sim" and device.is_cpu:
        return simulated_device(catalogue.gpu(wish.simulate_gpu or DEFAULT_SIMULATED_GPU))
    return device


def wanted_checkpoints(wish: FleetModel, model: ModelSpec) -> list[Checkpoint]:
    """The model's checkpoints in a precision that the fleet allows.

    `any` means the vendor's own (and weights without one, such as nano models): what others made
    of them may answer differently, so the fleet has to name its precision.
    """
    if wish.precision == "any":
        own = [entry for entry in model.checkpoints if not entry.third_party]
        return own or list(model.checkpoints)
    return [entry for entry in model.checkpoints if entry.precision in wish.precision]


def _parallel_sizes(
    wish: FleetModel, model: ModelSpec, checkpoint: Checkpoint, device: Device
) -> list[tuple[int, int, int]]:
    """Tensor parallel ranks, pipeline stages and data-parallel copies."""
    if checkpoint.format == "gguf":
        return [(1, 1, 1)]  # one rejection says it all
    if wish.nodes_per_replica > 1:
        return _sizes_over_nodes(wish, model, device)
    copies, gpus = wish.data_parallel_size or 1, device.gpus_per_node
    if wish.tensor_parallel_size is not None:
        return [(wish.tensor_parallel_size, 1, copies)]
    powers = [1 << power for power in range(gpus.bit_length())]
    sizes = [(ranks, 1, copies) for ranks in powers if ranks == 1 or ranks * copies <= gpus]
    if device.link in ("pcie", "pcie-no-p2p") and model.supports_pipeline_parallel and copies == 1:
        sizes += [
            (ranks, stages, 1)
            for stages in powers[1:]
            for ranks in powers
            if ranks * stages <= device.gpus_per_node
        ]
    return sizes


def _sizes_over_nodes(
    wish: FleetModel, model: ModelSpec, device: Device
) -> list[tuple[int, int, int]]:
    """All GPUs of the nodes: tensor parallel groups inside a node, unless the fleet says larger."""
    gpus = wish.nodes_per_replica * device.gpus_per_node
    tensor = [
        size for size in range(1, device.gpus_per_node + 1) if device.gpus_per_node % size == 0
    ]
    if wish.tensor_parallel_size is not None:
        tensor = [wish.tensor_parallel_size]
    if wish.data_parallel_size is not None:
        copies = wish.data_parallel_size
        sizes = [(ranks, gpus // (ranks * copies), copies) for ranks in tensor]
        flat = [each for each in sizes if each[1] == 1]  # copies in stages only where it must be
        return flat or [each for each in sizes if each[1]] or [(min(tensor), 1, copies)]
    sizes = [(ranks, max(1, gpus // ranks), 1) for ranks in tensor]
    if model.architecture.moe is None or device.is_cpu or wish.layer_partition:
        return sizes
    if wish.expert_parallel is False:
        return sizes  # parts of every expert on every node: nobody would want that unasked
    return sizes + [(ranks, 1, gpus // ranks) for ranks in tensor if ranks < gpus]


def filled_in(
    wish: FleetModel,
    model: ModelSpec,
    checkpoint: Checkpoint,
    device: Device,
    ranks: int,
    *,
    copies: int = 1,
) -> Candidate:
    """With so many ranks in a tensor-parallel group, and defaults for what the fleet leaves open."""
    on_cpu = device.is_cpu
    context = min(model.context, CPU_MAX_MODEL_LEN) if on_cpu else model.context
    seqs = wish.max_num_seqs or (CPU_MAX_NUM_SEQS if on_cpu else GPU_MAX_NUM_SEQS)
    expert_parallel = wish.expert_parallel
    if expert_parallel is None:
        several = copies > 1 or (ranks > 1 and not on_cpu)
        expert_parallel = model.architecture.moe is not None and several
    tokens = CPU_BATCHED_TOKENS if on_cpu else batched_tokens(copies, GPU_BATCHED_TOKENS)
    candidate = Candidate(
        model=model,
        checkpoint=checkpoint,
        device=device,
        engine=wish.engine,
        num_nodes=wish.nodes_per_replica,
        tensor_parallel_size=ranks,
        data_parallel_size=copies,
        tensor_parallel_across_nodes=wish.nodes_per_replica > 1,
        layer_partition=wish.layer_partition,
        expert_parallel=expert_parallel,
        max_model_len=wish.max_model_len or context,
        max_num_seqs=seqs,
        max_num_batched_tokens=wish.max_num_batched_tokens or max(seqs, tokens),
        gpu_memory_utilization=wish.gpu_memory_utilization,
        dtype=wish.dtype,
        kv_cache_dtype=wish.kv_cache_dtype,
        lora=wish.adapter_room,
        eplb=wish.eplb,
        extra_args=wish.engine_args,
    )
    return _with_whole_prompts(with_balance(candidate))


def _with_whole_prompts(candidate: Candidate) -> Candidate:
    """MLA on a CPU without AMX has no chunked prefill: a step must hold the longest prompt.

    vLLM sets max(max_model_len, 2048) itself, whatever the flag says (platforms/cpu.py
    check_and_update_config); other engines' limits stand.
    """
    device = candidate.device
    if candidate.architecture.mla is None or not device.is_cpu or device.amx:
        return candidate
    tokens = max(candidate.max_model_len, CPU_BATCHED_TOKENS)
    return replace(candidate, max_num_batched_tokens=tokens)


def longest_request(wish: FleetModel) -> int:
    """Tokens of the 95th percentile of the demand, prompt and answer."""
    if wish.demand is None:
        return CONTEXT_STEP
    lengths = (wish.demand.input_tokens, wish.demand.output_tokens)
    return math.ceil(sum(length.p95 or length.mean for length in lengths))


def with_context_that_fits(candidate: Candidate, *, at_least: int) -> Candidate:
    """Its context cut down to what the KV cache holds, unless that is less than `at_least`."""
    use = memory_use(candidate)
    if use.kv.holds_one_request:
        return candidate
    longest = longest_context(
        kv_layout(candidate),
        available_bytes=use.per_gpu.kv_cache_bytes,
        at_most=candidate.max_model_len,
    )
    rounded = longest // CONTEXT_STEP * CONTEXT_STEP
    if rounded < at_least:
        return candidate
    return _with_whole_prompts(replace(candidate, max_model_len=rounded))
