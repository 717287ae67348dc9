"""Constants of the performance model, by least squares from measured latency.

Written by `make calibrate` (tests/accuracy/calibrate.py): not to be edited by hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """Of Hopper under vLLM: shares of the data sheet, and fixed costs."""

    weight_bandwidth: float
    expert_bandwidth: float  # of routed experts: smaller matrices, gathered
    kv_bandwidth: float
    flops: float  # of dense matrices; of 16 bits, FP8 reaches less
    expert_flops: float  # of the 16-bit peak, whatever the precision
    attention_flops: float  # of the 16-bit peak
    step_s: float  # scheduling, sampling and answering of a step
    kernel_s: float
    sequence_s: float  # for each request of a step
    request_s: float  # from HTTP to the scheduler and back
    routing_evenness: float  # tokens choose as many experts as tokens^this that choose at random
    all_reduce_s: float  # of two ranks
    all_reduce_doubling_s: float
    two_shot_s: float  # more, where vLLM's custom all-reduce needs a second exchange
    together: float  # share of the other prompts that a prompt waits for, of the worst case


@dataclass(frozen=True, slots=True)
class LlamaConstants:
    """Of llama.cpp."""

    gpu_bandwidth: float  # share of Hopper's data sheet; other generations as their kernels
    layer_s: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Mean absolute relative errors of runs that were not fitted to."""

    tpot: float
    ttft: float


FITTED = Constants(
    weight_bandwidth=0.832,
    expert_bandwidth=0.504,
    kv_bandwidth=0.801,
    flops=0.66,
    expert_flops=0.177,
    attention_flops=0.703,
    step_s=0.000999,
    kernel_s=2.51e-06,
    sequence_s=1.98e-05,
    request_s=0.033,
    routing_evenness=0.677,
    all_reduce_s=5.19e-06,
    all_reduce_doubling_s=2.33e-06,
    two_shot_s=7.98e-06,
    together=0.146,
)
# A model that was not fitted to, on Hopper; and runs of old releases of vLLM on other generations.
KNOWN = Errors(tpot=0.06, ttft=0.17)
UNKNOWN = Errors(tpot=0.21, ttft=0.35)
LLAMACPP = LlamaConstants(gpu_bandwidth=0.835, layer_s=0.000119)
LLAMACPP_ERROR = 0.10  # of generation, of the rows that it was fitted to
