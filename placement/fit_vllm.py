"""The shapes in which vLLM can run a checkpoint on some GPUs: all of them, legal or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from placement.candidate import GIB, Candidate, Device, device_of
from placement.candidates import CPU_BATCHED_TOKENS, CPU_MAX_NUM_SEQS
from placement.catalogue import GpuType, ModelSpec
from placement.fit_answer import FitShape, Verdict
from placement.fit_checkpoints import Case, Weights
from placement.fit_request import FitRequest
from placement.inventory import Pool
from placement.kv_cache import longest_context
from placement.legality import first_rejection
from placement.memory import kv_layout, memory_use
from placement.performance import SPECULATIVE_TOKENS, Load
from placement.plan import Rejection
from placement.shape import make_shape

DEFAULT_UTILIZATION = 0.92  # vLLM 0.32 config/cache.py
# Requests at once and tokens a step: what a fleet gets by default, and what smaller cards try next.
_LIMITS = ((256, 8192), (64, 2048), (16, 1024))
_CPU_LIMITS = ((CPU_MAX_NUM_SEQS, CPU_BATCHED_TOKENS),)
_CONTEXT_STEP = 1024
_ALWAYS_ON_GPUS = 0.9  # of a checkpoint's bytes; a draft's embedding, say, is shared
_MEMORY_RULES = frozenset({"weights-exceed-memory", "kv-cache-below-one-request"})
# The model's own error: CUDA graphs take 0.1 to 1.0 GiB in logs, the worst of 16 logged caches was
# 0.44 GiB off; weights are known to 1 % from headers or a published size, to 2 % otherwise.
_FIXED_ERROR_BYTES = GIB // 2
_WEIGHTS_ERROR = {"header": 0.005, "catalogue": 0.01, "arithmetic": 0.02}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a replica is cut."""

    tensor: int
    pipeline: int
    data: int
    expert_parallel: bool

    @property
    def gpus(self) -> int:
        """Of one replica."""
        return self.tensor * self.pipeline * self.data


def vllm_shapes(case: Case, *, hopeless: bool = True) -> Iterator[FitShape | Rejection]:
    """One result for each way to cut the model that the request allows.

    Without `hopeless` those are left out whose GPUs are together smaller than the weights.
    """
    request, device = case.request, device_for(case.request, case.gpu)
    least = 0 if hopeless else int(case.weights.size_bytes * _ALWAYS_ON_GPUS)
    for sizes in sizes_to_try(case.model, request):
        if request.exact and sizes.gpus != request.total_gpus:
            continue
        if sizes.gpus * (device.memory_bytes or 0) < least:
            continue
        yield _judge(_candidate(case, device, sizes), case)
        if case.weights.gguf is not None:
            return  # one rejection says it all


def sizes_to_try(model: ModelSpec, request: FitRequest) -> Iterator[Sizes]:
    """Tensor x pipeline x data parallel sizes that the GPUs have room for, with and without EP."""
    moe = model.architecture.moe is not None
    total = request.total_gpus
    for tensor in _choices(request.tensor_parallel_size, request.num_gpus, total):
        for pipeline in _choices(request.pipeline_parallel_size, total // tensor, total):
            room = total // (tensor * pipeline) if moe else 1
            for data in _choices(request.data_parallel_size, room, total):
                if tensor * pipeline * data > total:
                    continue
                wanted = request.expert_parallel
                spread = (True, False) if moe and tensor * data > 1 else (False,)
                for expert_parallel in spread if wanted is None else (wanted,):
                    yield Sizes(tensor, pipeline, data, expert_parallel)


def device_for(request: FitRequest, gpu: GpuType) -> Device:
    """A rank's device. On `cpu` the host's memory is shared out, a quarter of it for the cache."""
    memory = budget = None
    if gpu.compute_capability is None and request.host_memory_gib is not None:
        memory = request.host_memory_gib / request.num_gpus
        budget = memory / 4
    pool = Pool(
        name="fit",
        gpu=gpu.name,
        nodes=request.num_nodes,
        gpus_per_node=request.num_gpus,
        memory_gib_per_gpu=memory,
        kv_cache_gib_per_gpu=budget,
    )
    return device_of(pool, gpu)


def error_band_bytes(weights_bytes: int, weights: Weights) -> int:
    """By how much one GPU's memory may differ from what is computed."""
    return int(_FIXED_ERROR_BYTES + weights_bytes * _WEIGHTS_ERROR[weights.sizes_from])


def _choices(wanted: int | None, at_most: int, total: int) -> tuple[int, ...]:
    """The size that is asked for, or powers of two, and all of an odd number of GPUs."""
    if wanted is not None:
        return (wanted,) if wanted <= total else ()
    powers = [1 << power for power in range(at_most.bit_length())]
    return tuple(sorted({*(size for size in powers if size <= at_most), at_most} - {0}))


def _candidate(case: Case, device: Device, sizes: Sizes) -> Candidate:
    model, weights, request = case.model, case.weights, case.request
    nodes = -(-sizes.gpus // request.num_gpus)
    candidate = Candidate(
        model=model,
        checkpoint=weights.checkpoint,
        device=device,
        num_nodes=nodes,
        tensor_parallel_size=sizes.tensor,
        pipeline_parallel_size=sizes.pipeline,
        data_parallel_size=sizes.data,
        expert_parallel=sizes.expert_parallel,
        tensor_parallel_across_nodes=request.tensor_parallel_size is not None,
        max_model_len=request.max_model_len or model.context,
        gpu_memory_utilization=request.gpu_memory_utilization or DEFAULT_UTILIZATION,
        vllm_release=request.vllm_release,
        dtype=weights.dtype,
        kv_cache_dtype=request.kv_cache_dtype,
        calibration=case.calibration,
    )
    limits = _CPU_LIMITS[0] if device.is_cpu else _LIMITS[0]
    return _limited(candidate, request, *limits)


def _limited(candidate: Candidate, request: FitRequest, seqs: int, tokens: int) -> Candidate:
    seqs = request.max_num_seqs or seqs
    tokens = request.max_num_batched_tokens or max(seqs, tokens)
    return replace(candidate, max_num_seqs=seqs, max_num_batched_tokens=tokens)


def _judge(candidate: Candidate, case: Case) -> FitShape | Rejection:
    """The shape with the largest limits that start safely, else with those that just start."""
    weights, request = case.weights, case.request
    rejection = first_rejection(candidate)
    if rejection is not None and rejection.rule not in _MEMORY_RULES:
        return rejection
    least = _smallest_wish(candidate, request)
    rejection = first_rejection(least)
    if rejection is not None:
        return rejection
    band = error_band_bytes(memory_use(candidate).per_gpu.weights_bytes, weights)
    limits = _CPU_LIMITS if candidate.device.is_cpu else _LIMITS
    attempts: tuple[tuple[Verdict, int], ...] = (("fits", band), ("tight", 0))
    for verdict, margin in attempts:
        for seqs, tokens in limits:
            limited = _limited(candidate, request, seqs, tokens)
            settled = _with_context_that_fits(limited, request, margin)
            if settled is not None:
                return _shape(settled, case, verdict, band)
    return _unexplained(candidate)


def _with_context_that_fits(
    candidate: Candidate, request: FitRequest, margin: int
) -> Candidate | None:
    """The candidate, its context cut down where that is allowed, if it runs with `margin` less."""
    smaller = _with_less_memory(candidate, margin)
    if first_rejection(smaller) is None:
        return candidate
    use = memory_use(smaller)
    if request.max_model_len is not None or use.missing_bytes > 0:
        return None
    longest = longest_context(
        kv_layout(smaller),
        available_bytes=use.per_gpu.kv_cache_bytes,
        at_most=candidate.max_model_len,
    )
    rounded = longest // _CONTEXT_STEP * _CONTEXT_STEP
    if rounded < request.shortest_context:
        return None
    cut = replace(candidate, max_model_len=rounded)
    return cut if first_rejection(_with_less_memory(cut, margin)) is None else None


def _with_less_memory(candidate: Candidate, margin: int) -> Candidate:
    if not margin or candidate.device.memory_bytes is None:
        return candidate
    share = 1.0 if candidate.device.is_cpu else candidate.gpu_memory_utilization
    memory = max(0, candidate.device.memory_bytes - int(margin / share))
    return replace(candidate, device=replace(candidate.device, memory_bytes=memory))


def _smallest_wish(candidate: Candidate, request: FitRequest) -> Candidate:
    """What was tried last: its rejection names the least that is missing."""
    limits = _CPU_LIMITS if candidate.device.is_cpu else _LIMITS
    context = min(request.shortest_context, candidate.max_model_len)
    return replace(_limited(candidate, request, *limits[-1]), max_model_len=context)


def _unexplained(candidate: Candidate) -> Rejection:
    """It would run with a context that is shorter than the shortest of use, and not a rule's."""
    return Rejection(
        shape={"engine": "vllm", "precision": candidate.checkpoint.precision},
        rule="kv-cache-below-one-request",
        reason="the KV cache holds no request of a useful length",
    )


def _shape(candidate: Candidate, case: Case, verdict: Verdict, band: int) -> FitShape:
    weights, request = case.weights, case.request
    replicas = request.total_gpus // candidate.num_ranks
    load = Load(
        concurrency=max(1, -(-(request.concurrency or 1) // max(1, replicas))),
        input_tokens=request.input_tokens,
        output_tokens=request.output_tokens,
        prefix_hit=request.prefix_hit,
        acceptance_rate=request.acceptance_rate,
        num_speculative_tokens=request.num_speculative_tokens or _drafted(candidate.model),
    )
    shape = make_shape(candidate, load=load)
    wanted = request.max_model_len or candidate.model.context
    notes = (*shape.notes, weights.note) if weights.note else shape.notes
    return FitShape(
        **{**dict(shape), "notes": notes},
        verdict=verdict,
        checkpoint=weights.checkpoint.source,
        checkpoint_bytes=weights.size_bytes,
        sizes_from=weights.sizes_from,
        gpus_per_replica=candidate.num_ranks,
        replicas=replicas,
        gpus=(shape.per_gpu,),
        limit=_limit(candidate, shape.kv_cache_tokens, shape.max_concurrency, wanted),
        wanted_context=wanted,
        error_band_bytes=band,
    )


def _drafted(model: ModelSpec) -> int:
    """Tokens that the model's draft proposes at once."""
    wanted = [draft.num_speculative_tokens for draft in model.drafts]
    return next((count for count in wanted if count), SPECULATIVE_TOKENS)


def _limit(candidate: Candidate, tokens: int, concurrency: float, wanted: int) -> str:
    context = candidate.max_model_len
    if context < wanted:
        return (
            f"KV cache of {tokens:,} tokens: one request of {context:,}, not of the model's "
            f"{wanted:,}"
        )
    slots = candidate.max_num_seqs * candidate.data_parallel_size
    if concurrency < slots:
        return (
            f"KV cache of {tokens:,} tokens: {concurrency:.1f} requests of {context:,}, up to "
            f"{slots} shorter ones"
        )
    return f"max_num_seqs {candidate.max_num_seqs}: the KV cache holds {concurrency:.0f} requests"
