"""What stands in the way of a model, and the smallest change that would clear it, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

from placement.candidate import GIB, Candidate
from placement.kv_cache import longest_context
from placement.memory import kv_layout, memory_use
from placement.option import Option
from placement.options import Options, furthest
from placement.packing import Places
from placement.plan import Unmet
from placement.weight_bytes import GGUF_BITS

_ANY = "allow another precision (`precision: any`)"
_LLAMACPP = {  # whose options have no candidate to look closer at
    "kv-cache-below-one-request": "a smaller max_model_len, or more kv_cache_gib_per_gpu",
    "weights-exceed-memory": "GPUs with more memory, or fewer bits per weight",
    "pages-from-disk": "nodes with more host memory, or fewer bits per weight",
    "host-memory-exceeded": "nodes with more host memory, or fewer bits per weight",
    "gpu-memory-unknown": "memory_gib_per_gpu in the inventory",
    "no-such-checkpoint": "the path of a .gguf file as `model`, or `engine: vllm`",
    "engine-has-no-loader": "engine: vllm",
}


def nothing_legal(options: Options) -> Unmet:
    """No shape of the model is possible on any pool."""
    model, closest = options.wish.name, furthest(options)
    if closest is None:
        rejection = options.rejected[0] if options.rejected else None
        rule = rejection.rule if rejection and options.wish.engine == "llamacpp" else ""
        return Unmet(
            model=model,
            constraint=f"{rejection.rule}: {rejection.reason}" if rejection else "no checkpoints",
            cheapest_relaxation=_LLAMACPP.get(rule, _ANY),
        )
    candidate, rejection = closest
    shape = f"{candidate.checkpoint.precision} on {candidate.num_ranks} x"
    return Unmet(
        model=model,
        constraint=f"{rejection.rule}: {shape} {candidate.device.gpu.name}: {rejection.reason}",
        cheapest_relaxation=_for_rule(candidate, rejection.rule),
    )


def service_level(option: Option, options: Options) -> Unmet:
    """Even one request alone is slower than the service level."""
    wish = options.wish
    prediction = option.capacity.prediction
    if not option.capacity.broken_promise:
        return Unmet(
            model=wish.name,
            constraint=f"{_on(option)} leaves no room for 5 % less memory",
            cheapest_relaxation="robust: prefer, or gpu_memory_utilization: 0.95 or less"
            if wish.engine == "llamacpp"
            else "robust: prefer, or GPUs with more memory",
        )
    return Unmet(
        model=wish.name,
        constraint=f"one request alone misses {option.capacity.broken_promise} on "
        f"{_on(option)}, the fastest",
        cheapest_relaxation=f"a slo of tpot_p95_ms {math.ceil(prediction.tpot_ms)} and "
        f"ttft_p95_s {math.ceil(prediction.ttft_s * 100) / 100:g}, or faster GPUs",
    )


def replica_limit(option: Option, options: Options) -> Unmet:
    """The demand needs more replicas than `replicas.max`."""
    wish = options.wish
    rate = wish.demand.requests_per_s if wish.demand else 0.0
    why = f", limited by {option.capacity.broken_promise}" if option.capacity.broken_promise else ""
    return Unmet(
        model=wish.name,
        constraint=f"{rate:g} requests/s need {option.replicas_needed} replicas on {_on(option)} at "
        f"{option.capacity.requests_per_s:.3g} requests/s each{why}; replicas.max is "
        f"{wish.replicas.max}",
        cheapest_relaxation=f"replicas.max: {option.replicas_needed}",
    )


def not_enough_gpus(option: Option, options: Options, free: Mapping[int, Places]) -> Unmet:
    """The GPUs are there, but other models have them; `free` are those that they leave, by group."""
    room, group = min((_room(option, places, group), group) for group, places in free.items())
    here = [part for part in option.parts if part.group == group]
    missing = max(1, option.replicas - room) * sum(part.gpus for part in here)
    where = f" in pool {here[0].pool.name}" if option.beside else ""
    return Unmet(
        model=options.wish.name,
        constraint=f"{option.replicas} replicas need {option.gpus} GPUs on {_on(option)}, of which "
        f"{free[group].gpus} are free{where}: room for {room} replicas",
        cheapest_relaxation=f"{missing} more GPUs in pool {here[0].pool.name}, "
        f"{max(part.gpus for part in here)} to a node",
    )


def _room(option: Option, places: Places, group: int) -> int:
    """Replicas for which a group has places."""
    sizes = [part.gpus for part in option.parts if part.group == group]
    return min(places.room(size) // sum(gpus // size for gpus in sizes) for size in sizes)


def too_much_on_spot(options: Options, *, firm_rate: float, firm: float) -> Unmet:
    """Nodes that cannot be taken away carry less than `max_spot_share` leaves to them."""
    wish = options.wish
    rate = wish.demand.requests_per_s if wish.demand else firm_rate
    share = math.ceil(100 * (1 - firm / rate)) / 100
    return Unmet(
        model=wish.name,
        constraint=f"{firm_rate:.3g} requests/s must not depend on spot nodes; the others carry "
        f"{firm:.3g}",
        cheapest_relaxation=f"max_spot_share: {share:g}, or more nodes that are not spot",
    )


def too_little_after_a_loss(node: str, left: float, wanted: float, options: Options) -> Unmet:
    """Without one node, the others carry less than the demand (`carry_node_loss`)."""
    wish = options.wish
    told = f"{left:.3g} of {wanted:.3g} requests/s" if wish.demand else "no replica"
    return Unmet(
        model=wish.name,
        constraint=f"the loss of node {node} leaves {told}",
        cheapest_relaxation=f"replicas.max above {wish.replicas.max}, one more node, or "
        "carry_node_loss: false",
    )


def _on(option: Option) -> str:
    ranks, precision = option.gpus_per_replica, option.candidate.checkpoint.precision
    if option.beside:
        pools = " and ".join(dict.fromkeys(part.pool.name for part in option.parts))
        return f"pools {pools} ({option.hardware}, {precision})"
    return f"pool {option.pool.name} ({ranks} x {option.gpu.name}, {precision})"


def _for_rule(candidate: Candidate, rule: str) -> str:
    """The way out of a rejection; the general one where the rule itself says what to change."""
    precision = candidate.checkpoint.precision
    ranks = candidate.tensor_parallel_size
    ways = {
        "weights-exceed-memory": _more_memory(candidate),
        "kv-cache-below-one-request": _shorter_context(candidate),
        "tensor-parallel-exceeds-node": f"tensor_parallel_size {candidate.device.gpus_per_node} or "
        "less, or nodes with more GPUs",
        "precision-needs-gpu": "a pool with GPUs, or a bf16 checkpoint",
        "precision-needs-newer-gpu": f"a newer GPU than {candidate.device.gpu.name}, or a bf16 "
        "checkpoint",
        "context-too-long": f"max_model_len: {candidate.model.context}",
        "batch-below-num-seqs": f"max_num_batched_tokens: {candidate.max_num_seqs}",
        "expert-parallel-needs-experts": "expert_parallel: false",
        "engine-has-no-loader": "engine: llamacpp, or a checkpoint that is not GGUF",
        "gpu-memory-unknown": "memory_gib_per_gpu in the inventory",
        "dtype-not-supported": "dtype: auto",
    }
    if precision in GGUF_BITS:
        return ways["engine-has-no-loader"]
    return ways.get(rule, f"another tensor_parallel_size than {ranks}")


def _more_memory(candidate: Candidate) -> str:
    device = candidate.device
    if device.memory_bytes is None:
        return ""
    missing = memory_use(candidate).missing_bytes
    share = 1.0 if device.is_cpu else candidate.gpu_memory_utilization
    wanted = (device.memory_bytes + missing / share) / GIB
    more = math.ceil(wanted * 10) / 10
    if device.is_cpu:
        return f"memory_gib_per_gpu: {more:g} or more, or fewer bits per weight"
    return f"GPUs with {more:g} GiB, more GPUs in a node, or fewer bits per weight"


def _shorter_context(candidate: Candidate) -> str:
    available = memory_use(candidate).per_gpu.kv_cache_bytes if candidate.device.memory_bytes else 0
    fits = longest_context(
        kv_layout(candidate), available_bytes=available, at_most=candidate.max_model_len
    )
    return f"max_model_len: {fits}" if fits else "a GPU with more memory"
