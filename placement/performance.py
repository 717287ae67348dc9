"""How fast a replica is: a roofline with measured efficiencies, fixed costs and collectives.

A decode step takes t0 + layers x t_layer + max((weights + KV) / bandwidth, FLOPs / peak) + two
all-reduces per layer. A mixture of experts reads the experts that its batch chooses, on average
E x (1 - (1 - k/E)^tokens). Prefill is FLOPs-bound. Between two tokens of a request, the prefills of
those that arrive meanwhile are waited for: TPOT = step + (running - 1) / output x their FLOPs.
Requests for which cache or slots have no room wait for others to end.

A pipeline of p stages works on p micro-batches at once, so that each gets a step in the time of a
pass of a p-th of the requests. Data-parallel copies share out the requests, and exchange tokens
before and after their experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.architecture import Architecture
from placement.candidate import Candidate
from placement.efficiency import (
    NO_MESSAGE,
    Collective,
    Efficiency,
    all_reduce,
    efficiency_of,
    exchange,
    send,
)
from placement.memory import kv_layout, memory_use, stages_of
from placement.notes import weight_only
from placement.parameters import Parameters, count_parameters, rank_parameters
from placement.pipeline import whole_model
from placement.plan import Prediction
from placement.weight_bytes import weights_bytes

_TOGETHER = 0.12  # of the worst case, all prompts at once: 0.10 to 0.16 for Llama-70B on H100


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica is asked to do at once."""

    concurrency: int
    input_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """A candidate's costs, from which every prediction follows. A rank's are of all its layers."""

    architecture: Architecture
    efficiency: Efficiency
    bandwidth_bytes_per_s: float
    flops: float  # of one rank, peak at the precision that it computes in
    always_read_bytes: float  # of one rank, per step
    expert_bytes: float  # of one rank, all routed experts
    flops_per_token: float  # of one rank
    prefill_flops_per_token: float  # of one rank: without the head, which only the last token needs
    attention_flops: float  # of one rank, per token and token of context
    kv_bytes_per_token: int
    all_reduce: Collective
    max_num_batched_tokens: int
    max_num_seqs: int  # of the replica
    kv_cache_tokens: int  # of the replica
    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    stage_imbalance: float = 1.0  # layers of the longest stage over those of an average one
    send: Collective = NO_MESSAGE
    exchange: Collective = NO_MESSAGE


def replica_speed(candidate: Candidate) -> ReplicaSpeed:
    """The costs of one replica of a candidate."""
    architecture, gpu = candidate.architecture, candidate.device.gpu
    ranks, copies = candidate.tensor_parallel_size, candidate.data_parallel_size
    rank = rank_parameters(
        architecture,
        tensor_parallel_size=ranks,
        expert_parallel=candidate.expert_parallel,
        data_parallel_size=copies,
    )
    layers = architecture.num_layers
    bytes_per_weight = weights_bytes(candidate, whole_model(layers)) / rank.total
    unread = rank.vision if architecture.tied_embeddings else rank.vision + rank.embedding
    working = _working_parameters(architecture)
    longest = max(stage.num_layers for stage in stages_of(candidate))
    return ReplicaSpeed(
        architecture=architecture,
        efficiency=efficiency_of(candidate),
        bandwidth_bytes_per_s=gpu.memory_bandwidth_bytes_per_s,
        flops=_peak_flops(candidate),
        always_read_bytes=(rank.total - unread - rank.experts) * bytes_per_weight,
        expert_bytes=rank.experts * bytes_per_weight,
        flops_per_token=2 * working / ranks,
        prefill_flops_per_token=2 * (working - _head(count_parameters(architecture))) / ranks,
        attention_flops=_attention_flops(architecture) / ranks,
        kv_bytes_per_token=kv_layout(candidate, whole_model(layers)).bytes_per_context_token,
        all_reduce=all_reduce(candidate),
        max_num_batched_tokens=candidate.max_num_batched_tokens,
        max_num_seqs=candidate.max_num_seqs * copies,
        kv_cache_tokens=memory_use(candidate).kv.tokens,
        data_parallel_size=copies,
        pipeline_parallel_size=candidate.pipeline_parallel_size,
        stage_imbalance=candidate.pipeline_parallel_size * longest / layers,
        send=send(candidate),
        exchange=exchange(candidate),
    )


def step_s(speed: ReplicaSpeed, *, concurrency: float, context: float) -> float:
    """Seconds of one decode step of `concurrency` requests of one copy with `context` tokens each."""
    batches = min(speed.pipeline_parallel_size, max(1, math.ceil(concurrency)))
    batch = concurrency / batches
    window = speed.architecture.sliding_window
    seen = context if window is None else _seen(speed.architecture, context)
    kv = batch * seen * speed.kv_bytes_per_token
    read = (_weights_read(speed, batch) + kv) / (
        speed.bandwidth_bytes_per_s * speed.efficiency.bandwidth
    )
    flops = batch * (speed.flops_per_token + seen * speed.attention_flops)
    compute = flops / (speed.flops * speed.efficiency.flops)
    sequences = batch * speed.efficiency.sequence_s
    one_pass = _fixed_s(speed, batch) + sequences + max(read, compute)
    balance = speed.stage_imbalance if batches > 1 else 1.0
    return one_pass * balance


def prefill_s(speed: ReplicaSpeed, tokens: float) -> float:
    """Seconds from the start of a prompt of `tokens` to its first token, nothing else running."""
    chunks = max(1, -(-int(tokens) // speed.max_num_batched_tokens))
    per_chunk = tokens / chunks
    read = _weights_read(speed, per_chunk) / (
        speed.bandwidth_bytes_per_s * speed.efficiency.bandwidth
    )
    one_chunk = _fixed_s(speed, per_chunk) + max(_prefill_work_s(speed, tokens) / chunks, read)
    stages = speed.pipeline_parallel_size  # chunks follow each other through them
    return one_chunk * (chunks + stages - 1) / stages * speed.stage_imbalance


def predict(speed: ReplicaSpeed, load: Load) -> Prediction:
    """Means under a steady `load`: each request is followed by the next."""
    context = load.input_tokens + load.output_tokens / 2
    admitted = min(load.concurrency, _room(speed, context))
    running = admitted / speed.data_parallel_size
    prefill = prefill_s(speed, load.input_tokens)
    step = step_s(speed, concurrency=running, context=context)
    others = max(0.0, running - 1)
    work = _prefill_work_s(speed, load.input_tokens) + load.input_tokens * _per_token_s(speed)
    work *= speed.stage_imbalance / speed.pipeline_parallel_size
    tpot = step + others / max(load.output_tokens, 1.0) * work
    # Requests that began together tend to stay together: a prompt waits for a part of the others'.
    waiting = step / 2 + _TOGETHER * others / 2 * work if others else 0.0
    ttft = speed.efficiency.request_s + prefill + waiting
    duration = ttft + max(load.output_tokens - 1, 0.0) * tpot
    queue = duration * (load.concurrency / admitted - 1)
    return Prediction(
        ttft_s=ttft + queue,
        tpot_ms=tpot * 1000,
        output_tokens_per_s=admitted * load.output_tokens / duration,
    )


def requests_per_s(prediction: Prediction, load: Load) -> float:
    """Rate at which a replica finishes requests under `load`."""
    return prediction.output_tokens_per_s / load.output_tokens


def _room(speed: ReplicaSpeed, context: float) -> float:
    """Requests that slots and cache hold at once, on average over their lives."""
    held = context if speed.architecture.sliding_window is None else 1.0
    return max(1.0, min(speed.max_num_seqs, speed.kv_cache_tokens / max(held, 1.0)))


def _prefill_work_s(speed: ReplicaSpeed, tokens: float) -> float:
    """Seconds that the FLOPs of a prompt take, which a step can hide nothing of."""
    seen = _seen(speed.architecture, tokens / 2)
    flops = tokens * (speed.prefill_flops_per_token + seen * speed.attention_flops)
    return flops / (speed.flops * speed.efficiency.flops)


def _seen(architecture: Architecture, context: float) -> float:
    """Tokens of the context that a layer looks at, on average over layers."""
    window = architecture.sliding_window
    if window is None:
        return context
    full = architecture.full_attention_layers / architecture.num_layers
    return full * context + (1 - full) * min(context, window)


def _fixed_s(speed: ReplicaSpeed, tokens: float) -> float:
    """What a pass costs whatever it computes, and its messages."""
    efficiency, layers = speed.efficiency, speed.architecture.num_layers
    moe = speed.architecture.moe
    sparse = 0 if moe is None else layers - moe.num_dense_layers
    message = tokens * speed.architecture.hidden_size * 2
    sends = (speed.pipeline_parallel_size - 1) * speed.send.seconds(message)
    return (
        efficiency.step_s
        + layers * (efficiency.layer_s + 2 * speed.all_reduce.seconds(message))
        + sparse * (efficiency.expert_layer_s + speed.exchange.seconds(message))
        + sends
    )


def _per_token_s(speed: ReplicaSpeed) -> float:
    """Seconds of messages for one more token in a step."""
    layers, message = speed.architecture.num_layers, speed.architecture.hidden_size * 2
    exchanged = 0.0 if speed.architecture.moe is None else layers * speed.exchange.s_per_byte
    return message * (2 * layers * speed.all_reduce.s_per_byte + exchanged)


def _weights_read(speed: ReplicaSpeed, tokens: float) -> float:
    moe = speed.architecture.moe
    if moe is None:
        return speed.always_read_bytes
    every = tokens * speed.data_parallel_size  # all copies use the same experts
    idle = math.pow(1 - moe.num_experts_per_token / moe.num_experts, every)
    return speed.always_read_bytes + speed.expert_bytes * (1 - idle)


def _peak_flops(candidate: Candidate) -> float:
    gpu, precision = candidate.device.gpu, candidate.checkpoint.precision
    if not weight_only(candidate):
        if precision == "fp8" and gpu.fp8_flops:
            return gpu.fp8_flops
        if precision in ("nvfp4", "mxfp4") and gpu.fp4_flops:
            return gpu.fp4_flops
    return gpu.bf16_flops


def _working_parameters(architecture: Architecture) -> int:
    parameters = count_parameters(architecture)
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
