"""How many requests a replica carries within its service level."""

from __future__ import annotations

from dataclasses import dataclass

from placement.fleet import Demand, Objective
from placement.performance import ReplicaSpeed, predict, prefill_s, requests_per_s
from placement.plan import Prediction
from placement.queueing import highest, load_at

__all__ = [
    "DEFAULT_DEMAND", "Capacity", "broken_promise", "capacity", "concurrency_for", "load_at",
    "ttft_p95_s",
]  # fmt: skip

DEFAULT_DEMAND = Demand(requests_per_s=0.0)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The fullest a replica may be: how many requests at once, their rate, and their speed."""

    concurrency: int  # 0: not even one request alone is fast enough
    requests_per_s: float
    prediction: Prediction
    broken_promise: str  # why not more, or "" when the engine's own limit comes first


def capacity(
    speed: ReplicaSpeed,
    *,
    max_num_seqs: int,
    kv_cache_tokens: int,
    demand: Demand | None,
    slo: Objective,
) -> Capacity:
    """The largest concurrency, up to what engine and cache hold, that keeps the service level.

    TTFT and TPOT grow with concurrency, so the largest is found by bisection. The rate is that of
    requests which come at random, at which 95% of them get what is promised and at most so many run
    at once (`queueing.py`); without a promise it is what the fullest replica finishes.
    """
    lengths = demand or DEFAULT_DEMAND
    tokens = lengths.input_tokens.mean + lengths.output_tokens.mean
    slots = max_num_seqs * speed.data_parallel_size
    most = max(1, min(slots, int(kv_cache_tokens // max(tokens, 1.0))))
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if broken_promise(speed, concurrency=middle, demand=lengths, slo=slo):
            high = middle - 1
        else:
            low = middle
    load = load_at(lengths, max(low, 1))
    prediction = predict(speed, load)
    broken = (
        broken_promise(speed, concurrency=low + 1, demand=lengths, slo=slo) if low < most else ""
    )
    rate = requests_per_s(prediction, load)
    if slo.ttft_p95_s is not None or (slo.tpot_p95_ms is not None and broken):
        rate = min(rate, highest(speed, lengths, slo, at_most=max(low, 1)).rate_per_s)
    return Capacity(
        concurrency=low,
        requests_per_s=rate if low else 0.0,
        prediction=prediction,
        broken_promise=broken,
    )


def broken_promise(speed: ReplicaSpeed, *, concurrency: int, demand: Demand, slo: Objective) -> str:
    """Which part of the service level `concurrency` requests at once would break, with numbers."""
    prediction = predict(speed, load_at(demand, concurrency))
    if slo.tpot_p95_ms is not None and prediction.tpot_ms > slo.tpot_p95_ms:
        return f"tpot_p95_ms {slo.tpot_p95_ms:g} (predicted {prediction.tpot_ms:.1f})"
    ttft = ttft_p95_s(speed, prediction, demand)
    if slo.ttft_p95_s is not None and ttft > slo.ttft_p95_s:
        return f"ttft_p95_s {slo.ttft_p95_s:g} (predicted {ttft:.2f})"
    return ""


def ttft_p95_s(speed: ReplicaSpeed, prediction: Prediction, demand: Demand) -> float:
    """TTFT of a prompt of the 95th percentile's length, under the load of `prediction`."""
    mean, p95 = demand.input_tokens.mean, demand.input_tokens.p95
    if p95 is None or p95 <= mean:
        return prediction.ttft_s
    hit = demand.prefix_hit
    longer = prefill_s(speed, p95, prefix_hit=hit) - prefill_s(speed, mean, prefix_hit=hit)
    return prediction.ttft_s + longer


def concurrency_for(speed: ReplicaSpeed, *, rate_per_s: float, at_most: int, demand: Demand) -> int:
    """The smallest concurrency at which a replica finishes `rate_per_s`, or `at_most`."""
    low, high = 1, max(1, at_most)
    while low < high:
        middle = (low + high) // 2
        load = load_at(demand, middle)
        if requests_per_s(predict(speed, load), load) >= rate_per_s:
            high = middle
        else:
            low = middle + 1
    return low
