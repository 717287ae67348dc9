"""Queueing: what requests see that come one by one, at a rate and not when others end.

They come as a Poisson process. How many run at once then varies: in a birth-and-death process whose
members stay for D(n) seconds, n has the mean N = rate x D(N) and the variance N / (1 - e), where e
is the elasticity of D (for a constant D: M/G/infinity, Poisson). Prompts wait for one another as in
M/G/1 (Pollaczek-Khinchine), with an exponential tail. The capacity is within 10% of that of a
simulated scheduler, or up to 22% too low where a second request breaks the promise
(tests/placement/test_capacity.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.fleet import Demand, Objective, TokenLengths
from placement.performance import Load, PromptCost, ReplicaSpeed, latency_s, prompt_cost

_P95 = 1.645  # of a normal distribution, in standard deviations
_TAIL = 0.05
_ROUNDS = 11


@dataclass(frozen=True, slots=True)
class Expected:
    """A replica at a rate of requests."""

    rate_per_s: float
    concurrency: float  # mean
    concurrency_p95: float
    ttft_p95_s: float
    tpot_p95_ms: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What a demand's prompts take of a replica."""

    usual: PromptCost
    long: PromptCost  # of the 95th percentile
    service_s: float  # for which a prompt keeps the others of the replica from being served
    sigma: float  # of the logarithm of prompts' lengths

    @classmethod
    def of(cls, speed: ReplicaSpeed, demand: Demand) -> Costs:
        """Of the demand's mean and long prompts."""
        lengths, hit = demand.input_tokens, demand.prefix_hit
        usual = prompt_cost(speed, lengths.mean, prefix_hit=hit)
        return cls(
            usual=usual,
            long=prompt_cost(speed, lengths.p95 or lengths.mean, prefix_hit=hit),
            service_s=usual.work_s / speed.data_parallel_size,
            sigma=lognormal_sigma(lengths),
        )


def load_at(demand: Demand, concurrency: float) -> Load:
    """`concurrency` requests of the demand's mean lengths."""
    return Load(
        concurrency,
        demand.input_tokens.mean,
        demand.output_tokens.mean,
        prefix_hit=demand.prefix_hit,
    )


def expected_with(
    speed: ReplicaSpeed, demand: Demand, *, concurrency: float, costs: Costs | None = None
) -> Expected:
    """What the rate that keeps `concurrency` requests running on average brings.

    `costs` are those of the demand's prompts, where they are known.
    """
    costs = costs or Costs.of(speed, demand)
    seen = concurrency + 1  # by a request: itself, and as many others as run on average
    ttft, tpot = latency_s(speed, load_at(demand, seen), cost=costs.usual)
    duration = ttft + (demand.output_tokens.mean - 1) * tpot
    more = _request_s(speed, demand, seen * 1.01, costs)
    elasticity = min(0.9, max(0.0, math.log(more / duration) / math.log(1.01)))
    rate = concurrency / duration
    high = seen + _P95 * math.sqrt(concurrency / (1 - elasticity))
    busier = latency_s(speed, load_at(demand, high), cost=costs.usual)[1] - tpot
    unlucky = _unlucky_s(demand, costs, rate, tpot)
    return Expected(
        rate_per_s=rate,
        concurrency=concurrency,
        concurrency_p95=high,
        ttft_p95_s=prompt_p95_s(speed, costs, rate, step_s=tpot),
        tpot_p95_ms=(tpot + math.hypot(busier, unlucky)) * 1000,
    )


def expected_at(
    speed: ReplicaSpeed, demand: Demand, *, rate_per_s: float, at_most: float
) -> Expected:
    """What a rate brings, or the rate at which `at_most` requests run on average if that is less."""
    low, high, costs = 0.0, float(at_most), Costs.of(speed, demand)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        enough = middle / _request_s(speed, demand, middle + 1, costs) >= rate_per_s
        low, high = (low, middle) if enough else (middle, high)
    return expected_with(speed, demand, concurrency=max(high, 1e-6), costs=costs)


def highest(
    speed: ReplicaSpeed,
    demand: Demand,
    slo: Objective,
    *,
    at_most: int,
    costs: Costs | None = None,
) -> Expected:
    """The highest rate at which 95% of requests get what `slo` promises, at most `at_most` at once.

    At least the rate at which requests hardly ever meet. `costs` are those of the demand's prompts,
    where they are known.
    """
    low, high = _TAIL / 2, float(at_most)
    costs = costs or Costs.of(speed, demand)
    best = expected_with(speed, demand, concurrency=low, costs=costs)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        found = expected_with(speed, demand, concurrency=middle, costs=costs)
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


def _unlucky_s(demand: Demand, costs: Costs, rate_per_s: float, tpot_s: float) -> float:
    """By how much TPOT is longer for an answer that more prompts than usual come between."""
    output = demand.output_tokens.mean
    prompts = rate_per_s * output * tpot_s
    size = costs.service_s * math.exp(costs.sigma**2 / 2)
    return _P95 * math.sqrt(prompts) * size / output


def prompt_p95_s(speed: ReplicaSpeed, costs: Costs, rate_per_s: float, *, step_s: float) -> float:
    """The 95th percentile of waiting, then the prompt; of long prompts, if these take longer.

    The running step is waited for, and the prompt's own step decodes too.
    """
    utilization = min(0.999, rate_per_s * costs.service_s)
    wait = costs.service_s * math.exp(costs.sigma**2) / (2 * (1 - utilization))  # of who waits
    waiting = wait * max(0.0, math.log(utilization / _TAIL)) if utilization > _TAIL else 0.0
    together = max(costs.usual.prefill_s, costs.usual.work_s + step_s)
    own = speed.efficiency.request_s + together + (1 - _TAIL) * step_s
    longest = max(0.0, costs.long.prefill_s - costs.usual.prefill_s)
    return own + math.hypot(waiting, longest)


def _request_s(speed: ReplicaSpeed, demand: Demand, concurrency: float, costs: Costs) -> float:
    ttft, tpot = latency_s(speed, load_at(demand, concurrency), cost=costs.usual)
    return ttft + (demand.output_tokens.mean - 1) * tpot
