"""Queueing: what requests see that come one by one, at a rate and not when others end.

They come as a Poisson process. How many run at once then varies: in a birth-and-death process whose
members stay for D(n) seconds, n has the mean N = rate x D(N) and the variance N / (1 - e), where e
is the elasticity of D (for a constant D: M/G/infinity, Poisson). Prompts wait for one another as in
M/G/1 (Pollaczek-Khinchine), with an exponential tail. The capacity is within 10% of a simulation of vLLM's
scheduler, up to 22% too low where a second request breaks the promise (test_capacity.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.fleet import Demand, Objective, TokenLengths
from placement.performance import Load, ReplicaSpeed, predict, prefill_s, prefill_work_s
from placement.plan import Prediction

_P95 = 1.645  # of a normal distribution, in standard deviations
_TAIL = 0.05
_ROUNDS = 14


@dataclass(frozen=True, slots=True)
class Expected:
    """A replica at a rate of requests."""

    rate_per_s: float
    concurrency: float  # mean
    concurrency_p95: float
    ttft_p95_s: float
    tpot_p95_ms: float


def load_at(demand: Demand, concurrency: float) -> Load:
    """`concurrency` requests of the demand's mean lengths."""
    return Load(
        concurrency,
        demand.input_tokens.mean,
        demand.output_tokens.mean,
        prefix_hit=demand.prefix_hit,
    )


def expected_with(speed: ReplicaSpeed, demand: Demand, *, concurrency: float) -> Expected:
    """What the rate that keeps `concurrency` requests running on average brings."""
    seen = concurrency + 1  # by a request: itself, and as many others as run on average
    usual = predict(speed, load_at(demand, seen))
    more = predict(speed, load_at(demand, seen * 1.01))
    duration = _request_s(usual, demand)
    growth = math.log(_request_s(more, demand) / duration) / math.log(1.01)
    elasticity = min(0.9, max(0.0, growth))
    rate = concurrency / duration
    high = seen + _P95 * math.sqrt(concurrency / (1 - elasticity))
    busy = predict(speed, load_at(demand, high))
    unlucky = _unlucky_ms(speed, demand, rate, usual.tpot_ms)
    return Expected(
        rate_per_s=rate,
        concurrency=concurrency,
        concurrency_p95=high,
        ttft_p95_s=_ttft_p95_s(speed, demand, rate, step_s=usual.tpot_ms / 1000),
        tpot_p95_ms=usual.tpot_ms + math.hypot(busy.tpot_ms - usual.tpot_ms, unlucky),
    )


def expected_at(
    speed: ReplicaSpeed, demand: Demand, *, rate_per_s: float, at_most: float
) -> Expected:
    """What a rate brings, or the rate at which `at_most` requests run on average if that is less."""
    low, high = 0.0, float(at_most)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        duration = _request_s(predict(speed, load_at(demand, middle + 1)), demand)
        low, high = (middle, high) if middle / duration < rate_per_s else (low, middle)
    return expected_with(speed, demand, concurrency=max(high, 1e-6))


def highest(speed: ReplicaSpeed, demand: Demand, slo: Objective, *, at_most: int) -> Expected:
    """The highest rate at which 95% of requests get what `slo` promises, at most `at_most` at once.

    At least the rate at which requests hardly ever meet.
    """
    low, high = _TAIL / 2, float(at_most)
    best = expected_with(speed, demand, concurrency=low)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        found = expected_with(speed, demand, concurrency=middle)
        if found.concurrency_p95 <= at_most and _keeps(found, slo):
            low, best = middle, found
        else:
            high = middle
    return best


def lognormal_sigma(lengths: TokenLengths) -> float:
    """Of the lognormal distribution with this mean and 95th percentile.

    ln(p95 / mean) = 1.645 s - s^2 / 2; the smaller root, or the widest where none exists.
    """
    if lengths.p95 is None or lengths.p95 <= lengths.mean:
        return 0.0
    inside = _P95**2 - 2 * math.log(lengths.p95 / lengths.mean)
    return _P95 - math.sqrt(max(0.0, inside))


def _keeps(expected: Expected, slo: Objective) -> bool:
    tpot, ttft = slo.tpot_p95_ms, slo.ttft_p95_s
    if tpot is not None and expected.tpot_p95_ms > tpot:
        return False
    return ttft is None or expected.ttft_p95_s <= ttft


def _unlucky_ms(speed: ReplicaSpeed, demand: Demand, rate_per_s: float, tpot_ms: float) -> float:
    """By how much TPOT is longer for an answer that more prompts than usual come between."""
    output = demand.output_tokens.mean
    prompts = rate_per_s * output * tpot_ms / 1000
    size = _service_s(speed, demand) * math.exp(lognormal_sigma(demand.input_tokens) ** 2 / 2)
    return _P95 * math.sqrt(prompts) * size / output * 1000


def _ttft_p95_s(speed: ReplicaSpeed, demand: Demand, rate_per_s: float, *, step_s: float) -> float:
    """The 95th percentile of waiting, then the prompt; of long prompts, if these take longer.

    The running step is waited for, and the prompt's own step decodes too.
    """
    mean, hit = demand.input_tokens.mean, demand.prefix_hit
    service = _service_s(speed, demand)
    utilization = min(0.999, rate_per_s * service)
    sigma = lognormal_sigma(demand.input_tokens)
    wait = service * math.exp(sigma**2) / (2 * (1 - utilization))  # of those who wait
    waiting = wait * max(0.0, math.log(utilization / _TAIL)) if utilization > _TAIL else 0.0
    prompt = prefill_s(speed, mean, prefix_hit=hit)
    longest = prefill_s(speed, demand.input_tokens.p95 or mean, prefix_hit=hit) - prompt
    together = max(prompt, prefill_work_s(speed, mean, prefix_hit=hit) + step_s)
    own = speed.efficiency.request_s + together + (1 - _TAIL) * step_s
    return own + math.hypot(waiting, max(0.0, longest))


def _service_s(speed: ReplicaSpeed, demand: Demand) -> float:
    """Seconds for which a prompt keeps the others of the replica from being served."""
    work = prefill_work_s(speed, demand.input_tokens.mean, prefix_hit=demand.prefix_hit)
    return work * speed.stage_imbalance / (speed.pipeline_parallel_size * speed.data_parallel_size)


def _request_s(prediction: Prediction, demand: Demand) -> float:
    return prediction.ttft_s + (demand.output_tokens.mean - 1) * prediction.tpot_ms / 1000
