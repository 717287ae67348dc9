"""What a replica's predictions follow from, in numbers: a plan keeps them with each variant."""

from __future__ import annotations

from dataclasses import dataclass

from placement.architecture import Architecture
from placement.fitted import UNKNOWN, Errors


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a device's data sheet, and fixed costs."""

    bandwidth: float
    flops: float
    step_s: float
    kernel_s: float
    expert_bandwidth: float = 1.0
    kv_bandwidth: float = 1.0
    expert_flops: float = 1.0  # of the 16-bit peak
    attention_flops: float = 1.0  # of the 16-bit peak
    sequence_s: float = 0.0  # per request in a decode step
    request_s: float = 0.0  # from HTTP to the scheduler and back: tokens in and out
    routing_evenness: float = 1.0
    together: float = 0.0
    errors: Errors = UNKNOWN


@dataclass(frozen=True, slots=True)
class Collective:
    """Cost of one collective operation on a message."""

    latency_s: float = 0.0
    s_per_byte: float = 0.0
    two_shot_bytes: float | None = None  # from this size on, ranks exchange twice
    two_shot_s: float = 0.0

    def seconds(self, message_bytes: float) -> float:
        """For a message of that size."""
        seconds = self.latency_s + self.s_per_byte * message_bytes
        if self.two_shot_bytes is None or message_bytes < self.two_shot_bytes:
            return seconds
        return seconds + self.two_shot_s


NO_MESSAGE = Collective()


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
