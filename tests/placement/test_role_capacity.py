"""What prefill and decode replicas carry, against simulated schedulers one after the other.

A prompt is read by one simulated replica; its request comes to the other with the cache in hand.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.capacity import Capacity, capacity
from placement.fleet import Demand, Objective, TokenLengths
from placement.performance import ReplicaSpeed, replica_speed
from placement.role_capacity import (
    NO_HANDOVER,
    Handover,
    decode_capacity,
    decode_tpot_ms,
    most_per_s,
    prefill_capacity,
    prefill_ttft_p95_s,
)
from tests.placement.batching import Reading, Request, Writing, open_loop, percentile, poisson
from tests.placement.builders import CATALOGUE, a_candidate, a_gpu_device

SMALL = CATALOGUE.model("mistral-small-3.2")
H100 = replica_speed(a_candidate(SMALL, device=a_gpu_device("H100-SXM")))
A100 = replica_speed(a_candidate(SMALL, device=a_gpu_device("A100-80-SXM")))
DOCUMENTS = Demand(
    requests_per_s=1.0,
    input_tokens=TokenLengths(mean=6000, p95=12000),
    output_tokens=TokenLengths(mean=300, p95=800),
)
CHAT = Demand(requests_per_s=1.0, output_tokens=TokenLengths(mean=300))
each_demand = pytest.mark.parametrize("demand", [DOCUMENTS, CHAT], ids=["documents", "chat"])


def reading(demand: Demand, *, ttft_s: float | None, handover: Handover = NO_HANDOVER) -> Capacity:
    slo = Objective(ttft_p95_s=ttft_s)
    return prefill_capacity(H100, demand=demand, slo=slo, handover=handover)


def writing(
    demand: Demand,
    *,
    tpot_ms: float | None,
    speed: ReplicaSpeed = A100,
    handover: Handover = NO_HANDOVER,
) -> Capacity:
    slo = Objective(tpot_p95_ms=tpot_ms)
    return decode_capacity(speed, max_num_seqs=256, demand=demand, slo=slo, handover=handover)


def arrivals(demand: Demand, rate: float, seed: int = 3) -> list[Request]:
    return poisson(
        rate, 700, input_tokens=demand.input_tokens, output_tokens=demand.output_tokens, seed=seed
    )


def ttft_p95(demand: Demand, rate: float) -> float:
    prompts = [replace(each, output_tokens=1) for each in arrivals(demand, rate)]
    done = open_loop(H100, prompts, of=Reading)[100:]
    return percentile([each.ttft_s for each in done], 0.95)


def tpot_p95_ms(demand: Demand, rate: float) -> float:
    speed = replace(A100, max_num_batched_tokens=1_000_000)  # a prompt takes no room of a step
    done = open_loop(speed, arrivals(demand, rate), of=Writing)[100:]
    return 1000 * percentile([each.tpot_s for each in done], 0.95)


@each_demand
def test_the_prefill_capacity_is_near_the_highest_rate_that_keeps_ttft(demand: Demand) -> None:
    promised = 4 * prefill_ttft_p95_s(H100, demand, NO_HANDOVER, rate_per_s=0.0)

    rate = reading(demand, ttft_s=promised).requests_per_s

    assert ttft_p95(demand, 0.85 * rate) <= promised
    assert ttft_p95(demand, 1.25 * rate) > promised


@each_demand
def test_the_decode_capacity_is_near_the_highest_rate_that_keeps_tpot(demand: Demand) -> None:
    promised = 1.5 * writing(demand, tpot_ms=None).prediction.tpot_ms
    promised = min(promised, 1.4 * decode_tpot_ms(A100, demand, rate_per_s=0.0, at_most=1))

    rate = writing(demand, tpot_ms=promised).requests_per_s

    assert tpot_p95_ms(demand, 0.85 * rate) <= promised
    assert tpot_p95_ms(demand, 1.35 * rate) > promised


def test_without_prompts_between_its_tokens_a_replica_writes_more() -> None:
    slo = Objective(tpot_p95_ms=45)
    whole = capacity(
        A100, max_num_seqs=256, kv_cache_tokens=A100.kv_cache_tokens, demand=DOCUMENTS, slo=slo
    )

    assert writing(DOCUMENTS, tpot_ms=45).requests_per_s > 1.5 * whole.requests_per_s


def test_time_on_the_way_leaves_less_for_reading() -> None:
    rates = [
        reading(DOCUMENTS, ttft_s=4.0, handover=Handover(transfer_s=seconds)).requests_per_s
        for seconds in (0.0, 0.5, 1.5, 4.0)
    ]

    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 4
    assert rates[-1] == 0.0


def test_a_prompt_that_is_too_slow_even_alone_says_what_it_would_take() -> None:
    slow = reading(DOCUMENTS, ttft_s=0.2, handover=Handover(transfer_s=0.1, first_token_s=0.05))

    assert slow.concurrency == 0
    assert slow.requests_per_s == 0.0
    assert slow.broken_promise.startswith("ttft_p95_s 0.2 (predicted ")
    assert "0.15 of it after the prompt is read" in slow.broken_promise


def test_what_the_prefix_cache_has_is_not_read_again() -> None:
    cached = DOCUMENTS.model_copy(update={"prefix_hit": 0.8})
    all_of_it = DOCUMENTS.model_copy(update={"prefix_hit": 1.0})

    rate = reading(DOCUMENTS, ttft_s=4.0).requests_per_s

    assert reading(cached, ttft_s=4.0).requests_per_s > 3 * rate
    assert reading(all_of_it, ttft_s=4.0).requests_per_s > 3 * rate


def test_a_full_network_caps_either_side_and_is_named() -> None:
    narrow = Handover(most_per_s=most_per_s(7.0))

    assert most_per_s(7.0) == pytest.approx(0.1)
    for side in (
        reading(DOCUMENTS, ttft_s=10.0, handover=narrow),
        writing(DOCUMENTS, tpot_ms=45, handover=narrow),
    ):
        assert side.requests_per_s == pytest.approx(0.1)
        assert "network" in side.broken_promise


def test_without_promises_a_replica_does_what_it_can() -> None:
    assert reading(DOCUMENTS, ttft_s=None).broken_promise == ""
    assert (
        reading(DOCUMENTS, ttft_s=None).requests_per_s
        >= reading(DOCUMENTS, ttft_s=60.0).requests_per_s
    )
    assert (
        writing(DOCUMENTS, tpot_ms=None).requests_per_s
        >= writing(DOCUMENTS, tpot_ms=45).requests_per_s
    )


def test_one_answer_that_is_too_slow_alone_carries_nothing() -> None:
    slow = writing(DOCUMENTS, tpot_ms=1.0)

    assert slow.concurrency == 0
    assert slow.requests_per_s == 0.0
    assert slow.broken_promise.startswith("tpot_p95_ms 1 ")
