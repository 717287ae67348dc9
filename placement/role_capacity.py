"""What a replica carries that does one part of a request's work only: prompts, or answers.

A prefill replica is a queue of prompts (M/G/1, `queueing.py`) without answers between them. A decode
replica makes steps without prompts between them. A request's first token takes both: waiting for
other prompts and its own, the cache on its way, a step of the decode replica.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from placement.capacity import DEFAULT_DEMAND, Capacity, load_at
from placement.fleet import Demand, Objective
from placement.performance import PromptCost, ReplicaSpeed, latency_s
from placement.plan import Prediction
from placement.queueing import Costs, highest, prompt_p95_s

_NO_PROMPT = PromptCost(prefill_s=0.0, work_s=0.0)
_NO_PROMPTS = Costs(usual=_NO_PROMPT, long=_NO_PROMPT, service_s=0.0, sigma=0.0)
_STEPS = 1.95  # until a first token: the rest of a running step at its worst, and one of its own
_BUSY = 0.7  # of a replica's share of the network, beyond which caches wait for one another
_ROUNDS = 20
_SHORTEST_S = 1e-4  # of a prompt that the prefix cache has all of


@dataclass(frozen=True, slots=True)
class Handover:
    """Between a prefill and a decode replica."""

    transfer_s: float = 0.0  # of a long prompt's cache
    first_token_s: float = 0.0  # from its arrival, on the fullest decode replica
    most_per_s: float = math.inf  # caches that the replica's share of the network carries

    @property
    def after_s(self) -> float:
        """What of TTFT comes after the prompt was read."""
        return self.transfer_s + self.first_token_s

    def within(self, each: Capacity) -> Capacity:
        """What the network leaves of a replica's capacity."""
        if each.requests_per_s <= self.most_per_s:
            return each
        broken = f"its share of the network ({self.most_per_s:.3g} KV caches/s)"
        return replace(each, requests_per_s=self.most_per_s, broken_promise=broken)


NO_HANDOVER = Handover()


def most_per_s(s_per_cache: float) -> float:
    """Caches that a share of a network carries which is busy so long with each."""
    return _BUSY / s_per_cache if s_per_cache > 0 else math.inf


def prefill_capacity(
    speed: ReplicaSpeed, *, demand: Demand | None, slo: Objective, handover: Handover
) -> Capacity:
    """The rate of prompts at which 95 % of first tokens come in time; without a promise, the most."""
    lengths = demand or DEFAULT_DEMAND
    costs, promised = Costs.of(speed, lengths), slo.ttft_p95_s
    fullest = 1 / max(costs.service_s, _SHORTEST_S)
    rate, broken = fullest, ""
    if promised is not None:
        rate = _highest_rate(speed, costs, promised - handover.after_s, fullest)
        slowest = _ttft_s(speed, costs, min(1.01 * rate, fullest), handover)
        if slowest > promised:
            broken = (
                f"ttft_p95_s {promised:g} (predicted {slowest:.2f}, {handover.after_s:.2f} of it "
                "after the prompt is read)"
            )
    alone = speed.efficiency.request_s + costs.usual.prefill_s + handover.after_s
    fast = Capacity(
        concurrency=math.ceil(rate * costs.usual.prefill_s) if rate > 0 else 0,
        requests_per_s=rate,
        prediction=Prediction(ttft_s=alone, tpot_ms=0.0, output_tokens_per_s=rate),
        broken_promise=broken,
    )
    return handover.within(fast)


def decode_capacity(
    speed: ReplicaSpeed,
    *,
    max_num_seqs: int,
    demand: Demand | None,
    slo: Objective,
    handover: Handover,
) -> Capacity:
    """The rate of answers whose tokens come in time; TTFT is promised by the prefill side."""
    lengths = demand or DEFAULT_DEMAND
    tokens = lengths.input_tokens.mean + lengths.output_tokens.mean
    slots = max_num_seqs * speed.data_parallel_size
    most = max(1, min(slots, int(speed.kv_cache_tokens // max(tokens, 1.0))))
    promised, low, high = slo.tpot_p95_ms, 0, most
    while low < high:
        middle = (low + high + 1) // 2
        late = promised is not None and _decode(speed, lengths, middle).tpot_ms > promised
        low, high = (low, middle - 1) if late else (middle, high)
    prediction, broken = _decode(speed, lengths, max(low, 1)), ""
    if promised is not None and low < most:
        slower = _decode(speed, lengths, low + 1).tpot_ms
        broken = f"tpot_p95_ms {promised:g} (predicted {slower:.1f})"
    rate = prediction.output_tokens_per_s / lengths.output_tokens.mean
    if slo.ttft_p95_s is not None or broken:
        steady = Objective(tpot_p95_ms=promised)
        found = highest(speed, lengths, steady, at_most=max(low, 1), costs=_NO_PROMPTS)
        rate = min(rate, found.rate_per_s)
    fast = Capacity(
        concurrency=low,
        requests_per_s=rate if low else 0.0,
        prediction=prediction,
        broken_promise=broken,
    )
    return handover.within(fast)


def first_token_s(speed: ReplicaSpeed, fullest: Capacity) -> float:
    """From a cache's arrival at the fullest decode replica to the first token."""
    return speed.efficiency.request_s + _STEPS * fullest.prediction.tpot_ms / 1000


def prefill_ttft_p95_s(
    speed: ReplicaSpeed, demand: Demand, handover: Handover, *, rate_per_s: float
) -> float:
    """TTFT when a prefill replica reads so many prompts a second."""
    return _ttft_s(speed, Costs.of(speed, demand), rate_per_s, handover)


def decode_tpot_ms(
    speed: ReplicaSpeed, demand: Demand, *, rate_per_s: float, at_most: int
) -> float:
    """TPOT when a decode replica writes so many answers a second."""
    low, high = 1, max(1, at_most)
    while low < high:
        middle = (low + high) // 2
        rate = _decode(speed, demand, middle).output_tokens_per_s / demand.output_tokens.mean
        low, high = (low, middle) if rate >= rate_per_s else (middle + 1, high)
    return _decode(speed, demand, low).tpot_ms


def _decode(speed: ReplicaSpeed, demand: Demand, concurrency: int) -> Prediction:
    load = load_at(demand, concurrency)
    ttft, tpot = latency_s(speed, load, cost=_NO_PROMPT)
    duration = ttft + max(load.output_tokens - 1, 0.0) * tpot
    return Prediction(
        ttft_s=ttft,
        tpot_ms=tpot * 1000,
        output_tokens_per_s=concurrency * max(load.output_tokens, 1.0) / duration,
    )


def _ttft_s(speed: ReplicaSpeed, costs: Costs, rate: float, handover: Handover) -> float:
    return prompt_p95_s(speed, costs, rate, step_s=0.0) + handover.after_s


def _highest_rate(speed: ReplicaSpeed, costs: Costs, promised_s: float, fullest: float) -> float:
    """At which a prompt is read in time; 0 where even one alone is not."""
    if prompt_p95_s(speed, costs, 0.0, step_s=0.0) > promised_s:
        return 0.0
    low, high = 0.0, fullest
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        in_time = prompt_p95_s(speed, costs, middle, step_s=0.0) <= promised_s
        low, high = (middle, high) if in_time else (low, middle)
    return low
