"""Capacity and queueing against a simulation of vLLM's scheduler, step by step.

Both take the same seconds for a step: what is compared is waiting, sharing and variation. Found by
bisection over rates, three seeds each, the highest rate that keeps a promise is between 9% above
and 8% below the capacity for dense models; for Mixtral between 22% above (a promise that a second
request breaks) and 7% below.
"""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.capacity import Capacity, capacity
from placement.catalogue import Checkpoint
from placement.fleet import Demand, Objective, TokenLengths
from placement.performance import Load, ReplicaSpeed, predict, replica_speed
from placement.queueing import expected_at, expected_with, lognormal_sigma
from tests.placement.batching import Request, closed_loop, open_loop, percentile, poisson
from tests.placement.builders import CATALOGUE, a_candidate, a_gpu_device

SMALL = CATALOGUE.model("mistral-small-3.2")
SPEEDS = {
    "24B on H100": replica_speed(a_candidate(SMALL, device=a_gpu_device("H100-SXM"))),
    "24B on 4 H100": replica_speed(
        a_candidate(SMALL, device=a_gpu_device("H100-SXM"), tensor_parallel_size=4)
    ),
    "Mixtral on H200": replica_speed(
        a_candidate(CATALOGUE.model("mixtral-8x7b"), device=a_gpu_device("H200-SXM"))
    ),
}
CHAT = (TokenLengths(mean=512), TokenLengths(mean=128))
MIXED = (TokenLengths(mean=1200, p95=4000), TokenLengths(mean=250, p95=700))
DOCUMENTS = (TokenLengths(mean=4000, p95=8000), TokenLengths(mean=200))
each_speed = pytest.mark.parametrize("name", SPEEDS)
each_mix = pytest.mark.parametrize("mix", [CHAT, MIXED, DOCUMENTS], ids=["chat", "mixed", "docs"])


def a_demand(mix: tuple[TokenLengths, TokenLengths], rate: float = 1.0) -> Demand:
    return Demand(requests_per_s=rate, input_tokens=mix[0], output_tokens=mix[1])


def simulated(speed: ReplicaSpeed, demand: Demand, rate: float, seed: int = 3) -> list[Request]:
    lengths = {"input_tokens": demand.input_tokens, "output_tokens": demand.output_tokens}
    done = open_loop(speed, poisson(rate, 700, **lengths, seed=seed))
    return done[100:]


def attained(requests: list[Request], slo: Objective) -> bool:
    tpot = percentile([each.tpot_s for each in requests], 0.95) * 1000
    ttft = percentile([each.ttft_s for each in requests], 0.95)
    return tpot <= (slo.tpot_p95_ms or tpot) and ttft <= (slo.ttft_p95_s or ttft)


def a_capacity(speed: ReplicaSpeed, demand: Demand, slo: Objective) -> Capacity:
    tokens = speed.kv_cache_tokens
    return capacity(speed, max_num_seqs=256, kv_cache_tokens=tokens, demand=demand, slo=slo)


@each_speed
@each_mix
def test_how_many_run_on_average_within_twenty_percent(
    name: str, mix: tuple[TokenLengths, TokenLengths]
) -> None:
    speed, demand = SPEEDS[name], a_demand(mix)
    expected = expected_with(speed, demand, concurrency=12)

    done = simulated(speed, demand, expected.rate_per_s)

    span = max(each.end_s for each in done) - min(each.arrival_s for each in done)
    assert sum(each.end_s - each.arrival_s for each in done) / span == pytest.approx(12, rel=0.2)


@each_speed
@each_mix
@pytest.mark.parametrize("concurrency", [4, 16])
def test_the_slowest_twentieth_within_twenty_percent(
    name: str, mix: tuple[TokenLengths, TokenLengths], concurrency: int
) -> None:
    speed, demand = SPEEDS[name], a_demand(mix)
    expected = expected_with(speed, demand, concurrency=concurrency)

    done = simulated(speed, demand, expected.rate_per_s)

    tpot = percentile([each.tpot_s for each in done], 0.95) * 1000
    ttft = percentile([each.ttft_s for each in done], 0.95)
    assert expected.tpot_p95_ms == pytest.approx(tpot, rel=0.2)
    assert expected.ttft_p95_s == pytest.approx(ttft, rel=0.2)


@each_speed
@each_mix
@pytest.mark.parametrize("slack", [3.0])
def test_the_capacity_is_within_fifteen_percent_of_the_highest_rate_that_keeps_the_promise(
    name: str, mix: tuple[TokenLengths, TokenLengths], slack: float
) -> None:
    speed, demand = SPEEDS[name], a_demand(mix)
    alone = expected_with(speed, demand, concurrency=0.2)
    slo = Objective(tpot_p95_ms=slack * alone.tpot_p95_ms, ttft_p95_s=slack * alone.ttft_p95_s)

    rate = a_capacity(speed, demand, slo).requests_per_s

    assert attained(simulated(speed, demand, 0.85 * rate), slo)
    assert not attained(simulated(speed, demand, 1.35 * rate), slo)


@pytest.mark.parametrize(
    ("concurrency", "tokens", "room"), [(16, (1024, 512), 10**6), (32, (4096, 256), 60_000)]
)
def test_closed_loops_with_and_without_room_for_all(
    concurrency: int, tokens: tuple[int, int], room: int
) -> None:
    speed = replace(SPEEDS["24B on H100"], kv_cache_tokens=room)
    draw = random.Random(1)
    lengths = [
        (round(tokens[0] * draw.uniform(0.8, 1.2)), round(tokens[1] * draw.uniform(0.8, 1.2)))
        for _ in range(10 * concurrency)
    ]

    done = closed_loop(speed, concurrency, lengths)

    prediction = predict(speed, Load(concurrency, *tokens))
    assert prediction.tpot_ms == pytest.approx(mean(e.tpot_s for e in done) * 1000, rel=0.12)
    assert prediction.ttft_s == pytest.approx(mean(e.ttft_s for e in done), rel=0.2)


def test_randomly_coming_requests_need_more_room_than_even_ones() -> None:
    speed, demand = SPEEDS["24B on H100"], a_demand(CHAT)
    slo = Objective(tpot_p95_ms=25)

    bound = a_capacity(speed, demand, slo)

    evenly = bound.prediction.output_tokens_per_s / demand.output_tokens.mean
    assert 0.4 * evenly < bound.requests_per_s < 0.9 * evenly


def test_what_a_rate_brings_is_found_again() -> None:
    speed, demand = SPEEDS["Mixtral on H200"], a_demand(MIXED)
    there = expected_with(speed, demand, concurrency=10)

    back = expected_at(speed, demand, rate_per_s=there.rate_per_s, at_most=64)

    assert back.concurrency == pytest.approx(10, rel=0.01)


def test_cached_prompts_let_more_requests_in() -> None:
    speed, slo = SPEEDS["24B on H100"], Objective(ttft_p95_s=1.0)
    plain = a_demand(DOCUMENTS)
    cached = plain.model_copy(update={"prefix_hit": 0.8})

    assert (
        a_capacity(speed, cached, slo).requests_per_s
        > 1.5 * a_capacity(speed, plain, slo).requests_per_s
    )


def test_a_stricter_promise_never_lets_more_in() -> None:
    @given(st.floats(20, 80), st.floats(0.2, 4.0), st.floats(1.0, 2.0))
    @settings(deadline=None, max_examples=30)
    def check(tpot: float, ttft: float, looser: float) -> None:
        speed, demand = SPEEDS["24B on H100"], a_demand(MIXED)
        strict = a_capacity(speed, demand, Objective(tpot_p95_ms=tpot, ttft_p95_s=ttft))
        loose = a_capacity(
            speed, demand, Objective(tpot_p95_ms=tpot * looser, ttft_p95_s=ttft * looser)
        )
        assert loose.requests_per_s >= strict.requests_per_s * 0.999

    check()


def test_the_length_distribution_has_the_mean_and_percentile_that_were_asked_for() -> None:
    lengths = TokenLengths(mean=1200, p95=4000)
    requests = poisson(1, 20_000, input_tokens=lengths, output_tokens=CHAT[1], seed=1)
    drawn = [each.input_tokens for each in requests]

    assert lognormal_sigma(CHAT[0]) == 0
    assert mean(drawn) == pytest.approx(1200, rel=0.05)
    assert percentile(drawn, 0.95) == pytest.approx(4000, rel=0.05)


def test_checkpoints_of_eight_bits_carry_more() -> None:
    fp8 = Checkpoint(precision="fp8", source="x")
    small = replica_speed(a_candidate(SMALL, device=a_gpu_device("H100-SXM"), checkpoint=fp8))
    slo = Objective(tpot_p95_ms=30)

    assert (
        a_capacity(small, a_demand(CHAT), slo).requests_per_s
        > a_capacity(SPEEDS["24B on H100"], a_demand(CHAT), slo).requests_per_s
    )
