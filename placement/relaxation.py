"""What stands in the way of a model, and the smallest change that would clear it, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from placement.candidate import GIB, Candidate, Device
from placement.candidates import longest_request, with_context_that_fits
from placement.easing import Easing
from placement.fleet import FleetModel, Objective
from placement.kv_cache import longest_context
from placement.legality import first_rejection
from placement.memory import kv_layout, memory_use
from placement.missing_room import Free, MissingRoom, places_for, room_for, wanted_replicas
from placement.option import SPEED_ERROR, Option, carried, with_less_memory
from placement.options import Options
from placement.performance import replica_speed
from placement.plan import Rejection, Unmet
from placement.slower_level import Slower
from placement.weight_bytes import GGUF_BITS

_MOST_GIB = 2048  # that a GPU is thought to have

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


def nothing_legal(
    options: Options,
    closest: tuple[Candidate, Rejection] | None,
    *,
    replicas: int,
    certain: bool,
) -> Unmet:
    """No shape of the model is possible on any pool.

    `closest` would have room for so many replicas. `certain`: as for `robust: require`.
    """
    model = options.wish.name
    if closest is None:
        rejection = options.rejected[0] if options.rejected else None
        rule = rejection.rule if rejection and options.wish.engine == "llamacpp" else ""
        return Unmet(
            model=model,
            constraint=f"{rejection.rule}: {rejection.reason}" if rejection else "no checkpoints",
            cheapest_relaxation=_LLAMACPP.get(rule, _ANY),
            easing=Easing(any_precision=rule not in _LLAMACPP),
        )
    candidate, rejection = closest
    shape = f"{candidate.checkpoint.precision} on {candidate.num_ranks} x"
    trial = _Trial(options.wish, replicas, certain=certain)
    way, easing = _for_rule(candidate, rejection.rule, trial)
    return Unmet(
        model=model,
        constraint=f"{rejection.rule}: {shape} {candidate.device.gpu.name}: {rejection.reason}",
        cheapest_relaxation=way,
        easing=easing,
    )


def no_memory_to_spare(option: Option, options: Options) -> Unmet:
    """It fits, but only just, and must also with less memory (`robust: require`)."""
    return Unmet(
        model=options.wish.name,
        constraint=f"{_on(option)} leaves no room for 5 % less memory",
        cheapest_relaxation="robust: prefer, or gpu_memory_utilization: 0.95 or less"
        if options.wish.engine == "llamacpp"
        else "robust: prefer, or GPUs with more memory",
    )


def too_slow(fastest: Option, slower: Slower, options: Options, free: Free) -> Unmet:
    """Even one request alone is slower than the service level; `slower`: one that could be had."""
    level = slower.level.model_dump(exclude_none=True)
    eased = " and ".join(f"{name} {value:g}" for name, value in reversed(level.items()))
    room = room_for(slower.option, options, free)
    ways = [f"a slo of {eased}", *room.in_words]
    return Unmet(
        model=options.wish.name,
        constraint=f"one request alone misses {fastest.capacity.broken_promise} on "
        f"{_on(fastest)}, the fastest",
        cheapest_relaxation=f"{', with '.join(ways)}, or faster GPUs",
        easing=Easing(slo=slower.level, max_replicas=room.max_replicas, more_nodes=room.more_nodes),
    )


def out_of_room(option: Option, options: Options, free: Free) -> Unmet:
    """The demand needs more replicas than `replicas.max`, or more GPUs than others leave."""
    wish, replicas = options.wish, wanted_replicas(option, options)
    room = room_for(option, options, free)
    if replicas > wish.replicas.max:
        rate = wish.demand.requests_per_s if wish.demand else 0.0
        broken = option.capacity.broken_promise
        constraint = (
            f"{rate:g} requests/s need {replicas} replicas on {_on(option)} at "
            f"{option.capacity.requests_per_s:.3g} requests/s each"
            f"{f', limited by {broken}' if broken else ''}; replicas.max is {wish.replicas.max}"
        )
    else:
        gpus = sum(places.gpus for places in free.values())
        constraint = (
            f"{replicas} replicas need {replicas * option.gpus_per_replica} GPUs on {_on(option)}, "
            f"of which {gpus} are free: room for {places_for(option, free)} replicas"
        )
    return Unmet(
        model=wish.name,
        constraint=constraint,
        cheapest_relaxation=", with ".join(room.in_words),
        easing=Easing(max_replicas=room.max_replicas, more_nodes=room.more_nodes),
    )


def too_much_on_spot(
    options: Options, *, firm_rate: float, firm: float, more: MissingRoom | None = None
) -> Unmet:
    """Nodes that cannot be taken away carry less than `max_spot_share` leaves to them.

    `more`: what must change beside that share.
    """
    wish = options.wish
    rate = wish.demand.requests_per_s if wish.demand else firm_rate
    share = math.ceil(100 * (1 - firm / rate)) / 100
    room = more or MissingRoom(None, ())
    return Unmet(
        model=wish.name,
        constraint=f"{firm_rate:.3g} requests/s must not depend on spot nodes; the others carry "
        f"{firm:.3g}",
        cheapest_relaxation=", with ".join([f"max_spot_share: {share:g}", *room.in_words])
        + ", or more nodes that are not spot",
        easing=Easing(
            max_spot_share=share, max_replicas=room.max_replicas, more_nodes=room.more_nodes
        ),
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
        easing=Easing(forgo_node_loss=True),
    )


def _on(option: Option) -> str:
    ranks, precision = option.gpus_per_replica, option.candidate.checkpoint.precision
    if option.beside:
        pools = " and ".join(dict.fromkeys(part.pool.name for part in option.parts))
        return f"pools {pools} ({option.hardware}, {precision})"
    return f"pool {option.pool.name} ({ranks} x {option.gpu.name}, {precision})"


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a candidate must do to be a way out."""

    wish: FleetModel
    replicas: int  # that may carry the demand
    certain: bool  # also with engines that are slower, and have less memory, than predicted

    def passes(self, candidate: Candidate) -> bool:
        """Whether it is legal, and its replicas carry the demand."""
        if self.certain:
            candidate = with_less_memory(candidate)
        if first_rejection(candidate) is not None:
            return False
        slower, slo = 1 - SPEED_ERROR if self.certain else 1.0, self.wish.slo
        level = Objective(
            ttft_p95_s=slo.ttft_p95_s and slo.ttft_p95_s * slower,
            tpot_p95_ms=slo.tpot_p95_ms and slo.tpot_p95_ms * slower,
        )
        found = carried(self.wish, candidate, replica_speed(candidate), level)
        rate = self.wish.demand.requests_per_s if self.wish.demand else 0.0
        return found.concurrency > 0 and self.replicas * found.requests_per_s * slower >= rate


def _for_rule(candidate: Candidate, rule: str, trial: _Trial) -> tuple[str, Easing]:
    """The way out of a rejection; the general one where the rule itself says what to change."""
    precision = candidate.checkpoint.precision
    ranks = candidate.tensor_parallel_size
    if precision in GGUF_BITS:
        rule = "engine-has-no-loader"
    if rule == "weights-exceed-memory":
        return _more_memory(candidate, trial), Easing()
    if rule == "kv-cache-below-one-request":
        return _shorter_context(candidate, trial)
    ways = {
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
    if rule in ways and rule != "tensor-parallel-exceeds-node":
        return ways[rule], Easing()
    asked = trial.wish.tensor_parallel_size is not None
    words = ways.get(rule, f"another tensor_parallel_size than {ranks}")
    return words, Easing(any_tensor_size=asked)


def _more_memory(candidate: Candidate, trial: _Trial) -> str:
    device = candidate.device
    if device.memory_bytes is None:
        return ""
    if device.is_cpu:
        needed = (device.memory_bytes + memory_use(candidate).missing_bytes) / GIB
        more = math.ceil(needed * 10) / 10
        return f"memory_gib_per_gpu: {more:g} or more, or fewer bits per weight"
    told = "more GPUs in a node, or fewer bits per weight"
    wanted = _enough_memory(candidate, trial)
    return (
        f"GPUs with more memory, {told}" if wanted is None else f"GPUs with {wanted:g} GiB, {told}"
    )


def _enough_memory(candidate: Candidate, trial: _Trial) -> float | None:
    """The least, GiB, with which the candidate passes; None: it lacks something else."""
    low, high = 0, _MOST_GIB * 10
    while low < high:
        middle = (low + high) // 2
        if trial.passes(_with_memory(candidate, trial.wish, middle / 10)):
            high = middle
        else:
            low = middle + 1
    return low / 10 if low < _MOST_GIB * 10 else None


def _with_memory(candidate: Candidate, wish: FleetModel, gib: float) -> Candidate:
    def larger(device: Device) -> Device:
        return replace(device, memory_bytes=max(device.memory_bytes or 0, int(gib * GIB)))

    found = replace(
        candidate,
        device=larger(candidate.device),
        rank_devices=tuple(map(larger, candidate.rank_devices)),
    )
    if wish.max_model_len is not None:
        return found
    return with_context_that_fits(found, at_least=longest_request(wish))


def _shorter_context(candidate: Candidate, trial: _Trial) -> tuple[str, Easing]:
    available = memory_use(candidate).per_gpu.kv_cache_bytes if candidate.device.memory_bytes else 0
    fits = longest_context(
        kv_layout(candidate), available_bytes=available, at_most=candidate.max_model_len
    )
    shorter = replace(candidate, max_model_len=max(fits, 1))
    if fits >= _usual_request(trial.wish) and trial.passes(shorter):
        return f"max_model_len: {fits}", Easing(max_model_len=fits)
    return _more_memory(candidate, trial), Easing()


def _usual_request(wish: FleetModel) -> float:
    """Tokens, prompt and answer."""
    if wish.demand is None:
        return 1.0
    return wish.demand.input_tokens.mean + wish.demand.output_tokens.mean
