"""How fast a replica is: a roofline with measured efficiencies, fixed costs and collectives.

A decode step takes its kernels' least time + max((weights + KV) / bandwidth, FLOPs / peak) + two
all-reduces per layer + a little for each request. A mixture of experts reads the experts that its
batch chooses, on average E x (1 - (1 - k/E)^tokens), on the rank that got most of them; real text
chooses less evenly, as if by fewer tokens. Prefill is FLOPs-bound: dense matrices, experts and
attention each reach their own share of the peak. Between two tokens of a request, the prefills of
those that arrive meanwhile are waited for: TPOT = step + (running - 1) / output x their time.
Requests for which cache or slots have no room wait for others to end.

A pipeline of p stages works on p micro-batches at once, so that each gets a step in p times that of
the slowest stage with a p-th of the requests; the last has the head and the sampler, too. Data-parallel copies share out the requests, and exchange tokens
before and after their experts. A draft of n tokens, each accepted with probability a, makes
(1 - a^(n+1)) / (1 - a) tokens a step (Leviathan et al., arXiv 2211.17192, eq. 1), in a step that
verifies n + 1 tokens of each request and runs the draft n times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from placement.architecture import Architecture
from placement.costs import ReplicaSpeed, StageSpeed
from placement.fitted import UNKNOWN
from placement.plan import Prediction
from placement.replica_speed import replica_speed

__all__ = [
    "SPECULATIVE_TOKENS", "Load", "PromptCost", "ReplicaSpeed", "latency_s", "predict", "prefill_s", "prefill_work_s",
    "prompt_cost", "replica_speed", "requests_per_s", "room", "stage_s", "step_s",
    "tokens_per_step",
]  # fmt: skip

SPECULATIVE_TOKENS = 3  # as the drafts of Mistral's models want


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica is asked to do at once."""

    concurrency: float
    input_tokens: float
    output_tokens: float
    prefix_hit: float = 0.0  # share of the prompt's tokens that the prefix cache has
    acceptance_rate: float | None = None  # of a draft's tokens, each; None: nothing is drafted
    num_speculative_tokens: int = SPECULATIVE_TOKENS


@dataclass(frozen=True, slots=True)
class PromptCost:
    """What a prompt takes of a replica, seconds, whatever else runs."""

    prefill_s: float  # until its first token, alone
    work_s: float  # for which it keeps others from being served


def step_s(
    speed: ReplicaSpeed, *, concurrency: float, context: float, tokens_each: int = 1
) -> float:
    """Seconds of one decode step of `concurrency` requests of one copy with `context` tokens each.

    `tokens_each`: more than one where a draft's tokens are verified.
    """
    batches = min(speed.pipeline_parallel_size, max(1, math.ceil(concurrency)))
    batch = concurrency / batches
    if speed.stages:
        times = [
            stage_s(stage, batch=batch, context=context, tokens_each=tokens_each)
            for stage in speed.stages
        ]
        return max(_in_all(speed, times), batches * max(times))
    one_pass = _one_pass_s(speed, batch=batch, context=context, tokens_each=tokens_each)
    if batches == 1:
        return one_pass
    return max(one_pass, batches * _slowest_stage_s(speed, one_pass, batch))


def _one_pass_s(
    speed: ReplicaSpeed, *, batch: float, context: float, tokens_each: int = 1
) -> float:
    """Seconds in which `batch` requests pass through all layers."""
    efficiency = speed.efficiency
    tokens = batch * tokens_each
    seen = context
    if speed.architecture.sliding_window is not None:
        seen = speed.architecture.tokens_seen(context)
    kv = batch * seen * speed.kv_bytes_per_token
    kv_s = kv / (speed.bandwidth_bytes_per_s * efficiency.kv_bandwidth)
    compute = _matrices_s(speed, tokens, speed.flops_per_token) + tokens * seen * (
        speed.attention_flops / (speed.flops_16_bit * efficiency.attention_flops)
    )
    return (
        efficiency.step_s
        + speed.kernels * efficiency.kernel_s
        + batch * efficiency.sequence_s
        + max(_weights_s(speed, tokens) + kv_s, compute)
        + _messages_s(speed, tokens)
    )


def stage_s(stage: StageSpeed, *, batch: float, context: float, tokens_each: int = 1) -> float:
    """Of a pass of `batch` requests, one stage of a pipeline over nodes, with its send."""
    speed = stage.speed
    one_pass = _one_pass_s(speed, batch=batch, context=context, tokens_each=tokens_each)
    last = _last_s(speed, one_pass, batch)
    message = batch * tokens_each * speed.architecture.hidden_size * 2
    seconds = stage.share * (one_pass - last) + stage.send.seconds(message)
    return seconds + last if stage.is_last else seconds


def _last_s(speed: ReplicaSpeed, one_pass: float, batch: float) -> float:
    """Of a pass, what is not of layers: the step's fixed costs, the sampler, the head."""
    efficiency = speed.efficiency
    head = speed.head_bytes / (speed.bandwidth_bytes_per_s * efficiency.bandwidth)
    return min(one_pass, efficiency.step_s + batch * efficiency.sequence_s + head)


def _slowest_stage_s(speed: ReplicaSpeed, one_pass: float, batch: float) -> float:
    """Of a pass through all stages: the longest, or the last, which has head and sampler too."""
    last = _last_s(speed, one_pass, batch)
    layers = one_pass - last
    longest = layers * speed.stage_imbalance / speed.pipeline_parallel_size
    return max(longest, layers * speed.last_stage_share + last)


def prefill_s(speed: ReplicaSpeed, tokens: float, *, prefix_hit: float = 0.0) -> float:
    """Seconds from the start of a prompt of `tokens` to its first token, nothing else running."""
    return prompt_cost(speed, tokens, prefix_hit=prefix_hit).prefill_s


def prompt_cost(speed: ReplicaSpeed, tokens: float, *, prefix_hit: float = 0.0) -> PromptCost:
    """Of a prompt of which the prefix cache has a share of `prefix_hit`."""
    new = max(1.0, tokens * (1 - prefix_hit))
    chunks = max(1, -(-int(new) // speed.max_num_batched_tokens))
    if speed.stages:
        return _spanning_prompt_cost(speed, tokens, prefix_hit, chunks=chunks)
    kernels = speed.efficiency.step_s + speed.kernels * speed.efficiency.kernel_s
    read = kernels + _weights_s(speed, new / chunks)
    work = prefill_work_s(speed, tokens, prefix_hit=prefix_hit)
    # Kernels are launched ahead of the GPU's work, so the longer of the two counts.
    one_chunk = _messages_s(speed, 0.0) + max(work / chunks, read)
    stages = speed.pipeline_parallel_size  # chunks follow each other through them
    return PromptCost(
        prefill_s=one_chunk * (chunks + stages - 1) / stages * speed.stage_imbalance,
        work_s=work * speed.stage_imbalance / stages,
    )


def _spanning_prompt_cost(
    speed: ReplicaSpeed, tokens: float, prefix_hit: float, *, chunks: int
) -> PromptCost:
    """Chunks follow each other through the stages, at the pace of the slowest."""
    message = tokens * (1 - prefix_hit) / chunks * speed.architecture.hidden_size * 2
    times, works = [], []
    for stage in speed.stages:
        alone = prompt_cost(stage.speed, tokens, prefix_hit=prefix_hit)
        sent = stage.send.seconds(message)
        times.append(stage.share * alone.prefill_s / chunks + sent)
        works.append(stage.share * alone.work_s)
    return PromptCost(
        prefill_s=_in_all(speed, times) + (chunks - 1) * max(times),
        work_s=max(works),
    )


def _in_all(speed: ReplicaSpeed, times: Sequence[float]) -> float:
    """Of all stages, those that are alike told once."""
    return sum(stage.count * time for stage, time in zip(speed.stages, times, strict=True))


def prefill_work_s(speed: ReplicaSpeed, tokens: float, *, prefix_hit: float = 0.0) -> float:
    """Seconds of FLOPs and messages of a prompt, which a step can hide nothing of."""
    new = tokens * (1 - prefix_hit)
    seen = speed.architecture.tokens_seen(tokens * (1 + prefix_hit) / 2)
    attention = speed.attention_flops / (speed.flops_16_bit * speed.efficiency.attention_flops)
    matrices = _matrices_s(speed, new, speed.prefill_flops_per_token)
    return matrices + new * (seen * attention + _message_s_per_token(speed))


def predict(speed: ReplicaSpeed, load: Load) -> Prediction:
    """Means under a steady `load`: each request is followed by the next.

    As a closed-loop benchmark measures them, all of whose first requests come at once.
    """
    ttft, tpot = latency_s(speed, load)
    duration = ttft + max(load.output_tokens - 1, 0.0) * tpot
    errors = speed.efficiency.errors
    if load.acceptance_rate is not None:  # drafts were never measured
        errors = UNKNOWN
    return Prediction(
        ttft_s=ttft,
        tpot_ms=tpot * 1000,
        output_tokens_per_s=load.concurrency * max(load.output_tokens, 1.0) / duration,
        ttft_error=errors.ttft,
        tpot_error=errors.tpot,
    )


def latency_s(
    speed: ReplicaSpeed, load: Load, *, cost: PromptCost | None = None
) -> tuple[float, float]:
    """TTFT and TPOT of `predict`, seconds; `cost` is that of the load's prompts, where it is known."""
    if cost is None:
        cost = prompt_cost(speed, load.input_tokens, prefix_hit=load.prefix_hit)
    output = max(load.output_tokens, 1.0)
    context = load.input_tokens + output / 2
    admitted = min(load.concurrency, room(speed, context))
    running = admitted / speed.data_parallel_size
    step = _time_per_token_s(speed, load, running=running, context=context)
    others = max(0.0, running - 1)
    # Requests that began together tend to stay together: a prompt waits for a part of the others',
    # for the rest its answer does.
    waiting = speed.efficiency.together * others / 2 * cost.work_s
    tpot = step + (others * cost.work_s - waiting) / output
    ttft = speed.efficiency.request_s + cost.prefill_s + waiting + (step / 2 if others else 0.0)
    ttft, tpot = ttft * speed.ttft_factor, tpot * speed.tpot_factor
    if admitted == load.concurrency:
        return ttft, tpot
    queue = (ttft + max(output - 1, 0.0) * tpot) * (load.concurrency / admitted - 1)
    before = 1.0
    if admitted < speed.max_num_seqs:
        before = _queued_before_share(load.input_tokens, output)
    return ttft + queue * before, tpot + queue * (1 - before) / max(output - 1, 1.0)


def requests_per_s(prediction: Prediction, load: Load) -> float:
    """Rate at which a replica finishes requests under `load`."""
    return prediction.output_tokens_per_s / load.output_tokens


def room(speed: ReplicaSpeed, context: float) -> float:
    """Requests that slots and cache hold at once, on average over their lives."""
    held = context if speed.architecture.sliding_window is None else 1.0
    return max(1.0, min(speed.max_num_seqs, speed.kv_cache_tokens / max(held, 1.0)))


def _queued_before_share(input_tokens: float, output_tokens: float) -> float:
    """Of the waiting for room, what comes before the first token.

    A prompt starts as soon as its own tokens have room; when answers grow beyond the cache, the
    newest gives way and waits again. 0.35 for 1024 / 8192 tokens in a simulation of vLLM's scheduler
    (tests/placement/batching.py), 1.0 for 8192 / 1024.
    """
    return input_tokens / (input_tokens + output_tokens / 4)


def tokens_per_step(acceptance_rate: float, num_speculative_tokens: int) -> float:
    """Expected tokens of a step that verifies a draft: 1 + a + a^2 + ... + a^n."""
    return sum(acceptance_rate**power for power in range(num_speculative_tokens + 1))


def _time_per_token_s(speed: ReplicaSpeed, load: Load, *, running: float, context: float) -> float:
    """Seconds between two tokens of a request while no prompt is prefilled."""
    if load.acceptance_rate is None:
        return step_s(speed, concurrency=running, context=context)
    drafted = load.num_speculative_tokens
    verify = step_s(speed, concurrency=running, context=context, tokens_each=drafted + 1)
    draft, efficiency = speed.draft, speed.efficiency
    proposal = (
        draft.kernels * efficiency.kernel_s
        + draft.read_bytes / (speed.bandwidth_bytes_per_s * efficiency.bandwidth)
        + draft.messages * speed.all_reduce.latency_s
    )
    return (verify + drafted * proposal) / tokens_per_step(load.acceptance_rate, drafted)


def _matrices_s(speed: ReplicaSpeed, tokens: float, flops_per_token: float) -> float:
    """Seconds of the FLOPs of dense matrices and of experts."""
    efficiency, experts = speed.efficiency, speed.expert_flops_per_token
    dense = (flops_per_token - experts) / (speed.flops * efficiency.flops)
    if not experts:
        return tokens * dense
    return tokens * (dense + experts / (speed.flops_16_bit * efficiency.expert_flops))


def _messages_s(speed: ReplicaSpeed, tokens: float) -> float:
    """Of a pass: all-reduces, exchanges of experts' tokens, sends between stages."""
    message = tokens * speed.architecture.hidden_size * 2
    seconds = speed.all_reduces * speed.all_reduce.seconds(message)
    seconds += speed.small_messages * speed.all_reduce.latency_s
    if speed.data_parallel_size > 1:
        seconds += _sparse_layers(speed.architecture) * speed.exchange.seconds(message)
    if speed.pipeline_parallel_size > 1:
        seconds += (speed.pipeline_parallel_size - 1) * speed.send.seconds(message)
    return seconds


def _message_s_per_token(speed: ReplicaSpeed) -> float:
    """Seconds of messages for one more token in a step."""
    message = speed.architecture.hidden_size * 2
    exchanged = _sparse_layers(speed.architecture) * speed.exchange.s_per_byte
    return message * (speed.all_reduces * speed.all_reduce.s_per_byte + exchanged)


def _sparse_layers(architecture: Architecture) -> int:
    """Those with experts."""
    return (
        0
        if architecture.moe is None
        else architecture.num_layers - architecture.moe.num_dense_layers
    )


def _weights_s(speed: ReplicaSpeed, tokens: float) -> float:
    """Seconds in which a pass reads its weights."""
    efficiency, moe = speed.efficiency, speed.architecture.moe
    always = speed.always_read_bytes / (speed.bandwidth_bytes_per_s * efficiency.bandwidth)
    if moe is None:
        return always
    every = tokens * speed.data_parallel_size  # all copies use the same experts
    idle = 1 - moe.num_experts_per_token / moe.num_experts
    used = 1 - math.pow(idle, math.pow(every, efficiency.routing_evenness))
    if speed.expert_spread:
        deviation = math.sqrt(used * (1 - used) / speed.experts_per_rank)
        used = min(1.0, used + speed.expert_spread * deviation)
    experts = speed.expert_bytes * used
    return always + experts / (speed.bandwidth_bytes_per_s * efficiency.expert_bandwidth)
