"""What windows of an engine say about its speed, and which say nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.calibration import Calibration
from placement.performance import Load
from placement.speed_comparison import WINDOWS, compare, measured, surprises
from placement.speed_window import EngineCounters, Sample, flaw, window_of
from tests.placement.builders import a_candidate, a_cpu_device, a_gpu_device
from tests.placement.speed_windows import a_planned_speed, a_window, samples_of

PLANNED = a_planned_speed()


@given(
    concurrency=st.integers(1, 200),
    input_tokens=st.floats(1, 8000),
    output_tokens=st.floats(2, 2000),
    prefix_hit=st.floats(0, 0.95),
    counted=st.floats(0, 1e9),
)
def test_a_window_tells_load_and_speed_whatever_was_counted_before(
    *,
    concurrency: int,
    input_tokens: float,
    output_tokens: float,
    prefix_hit: float,
    counted: float,
):
    load = Load(concurrency, input_tokens, output_tokens, prefix_hit)
    begin = EngineCounters(*[counted] * 6)

    window = window_of(samples_of(load, ttft_s=0.4, tpot_s=0.02, seconds=300, begin=begin))

    if window is None:  # less than one prompt came
        assert concurrency * 300 / (0.4 + (output_tokens - 1) * 0.02) < 2
        return
    assert window.ttft_s == pytest.approx(0.4, rel=1e-3)
    assert window.tpot_s == pytest.approx(0.02, rel=1e-3)
    assert window.concurrency == concurrency
    assert window.input_tokens == pytest.approx(input_tokens, rel=1e-3)
    assert window.output_tokens == pytest.approx(output_tokens, rel=1e-3)
    assert window.prefix_hit == pytest.approx(prefix_hit, rel=1e-3, abs=1e-4)
    assert window.drift == window.waiting == 0


def test_a_token_sees_more_requests_than_run_on_average():
    """Twelve or none, half the time each: tokens are made while twelve run."""
    steady = samples_of(Load(12, 500, 100), ttft_s=0.2, tpot_s=0.02)
    bursts = [replace(sample, running=12 * (number % 2)) for number, sample in enumerate(steady)]

    window = window_of(bursts)

    assert window is not None
    assert window.concurrency == 12


def test_counters_that_began_anew_say_nothing():
    begin = EngineCounters(*[1000.0] * 6)
    samples = samples_of(Load(8, 500, 100), ttft_s=0.2, tpot_s=0.02, begin=begin)
    restarted = samples_of(Load(8, 500, 100), ttft_s=0.2, tpot_s=0.02, seconds=5, began_s=1021.0)

    assert window_of(samples) is not None
    assert window_of([*samples, *restarted]) is None


def test_an_idle_engine_says_nothing():
    idle = [Sample(float(n), 0, 0, EngineCounters(*[7.0] * 6)) for n in range(60)]

    assert window_of(idle) is None
    assert window_of(idle[:2]) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompts": 19}, "too few"),
        ({"intervals": 199}, "too few"),
        ({"waiting": 2.0}, "overloaded"),
        ({"preemptions": 1}, "overloaded"),
        ({"drift": 4.5}, "the load changed"),
        ({"drafted": 1}, "drafted"),
        ({"answer_s": 1.9}, "may not be all"),
    ],
    ids=str,
)
def test_a_window_that_says_nothing_of_predictions_is_named(changes, why: str):
    assert why in flaw(a_window(PLANNED, **changes))


def test_a_steady_window_with_enough_answers_counts():
    assert flaw(a_window(PLANNED)) == ""
    assert flaw(a_window(PLANNED, concurrency=1.5, drift=0.9)) == ""  # one more or less is chance


@given(
    truth=st.floats(0.3, 3),
    noise=st.floats(0, 0.1),
    concurrency=st.floats(1, 200),
    input_tokens=st.floats(16, 20_000),
    output_tokens=st.floats(2, 2000),
    prefix_hit=st.floats(0, 0.9),
    seed=st.integers(0, 10**6),
)
def test_a_known_factor_is_found_again_under_any_load(
    *,
    truth: float,
    noise: float,
    concurrency: float,
    input_tokens: float,
    output_tokens: float,
    prefix_hit: float,
    seed: int,
):
    """Of an engine that is `truth` times as slow as predicted, through windows with noise."""
    chance = random.Random(seed)
    calibration = Calibration()
    for _ in range(30):
        windows = [
            a_window(
                PLANNED,
                ttft=truth * math.exp(chance.gauss(0, noise)),
                tpot=truth * math.exp(chance.gauss(0, noise)),
                concurrency=concurrency,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                prefix_hit=prefix_hit,
            )
            for _ in range(WINDOWS)
        ]
        found = measured(PLANNED, [compare(PLANNED, window) for window in windows])
        calibration = calibration.with_measured(
            PLANNED.setup, model="m", observed="", ttft=found.ttft_ratio, tpot=found.tpot_ratio
        )

    corrected = calibration.speed_correction(PLANNED.setup, PLANNED.costs.efficiency.errors)

    assert corrected.tpot == pytest.approx(truth, rel=0.02 + 0.5 * noise)
    assert corrected.ttft == pytest.approx(truth, rel=0.02 + 0.5 * noise)
    assert corrected.errors.tpot < 0.05 + noise


def test_two_bad_windows_of_five_hardly_move_a_measurement():
    windows = [a_window(PLANNED, tpot=ratio) for ratio in (1.19, 1.2, 1.21, 9.0, 0.01)]

    found = measured(PLANNED, [compare(PLANNED, window) for window in windows])

    assert found.tpot_ratio == pytest.approx(1.2)


def test_a_correction_does_not_feed_on_itself():
    """Planned, measured, corrected, planned again: the ratio is that of the model alone each time."""
    candidate, calibration, factors = a_candidate(), Calibration(), []
    for _ in range(40):
        planned = a_planned_speed(replace(candidate, calibration=calibration))
        window = a_window(planned, ttft=0.7, tpot=1.4)
        found = measured(planned, [compare(planned, window)] * WINDOWS)
        calibration = calibration.with_measured(
            planned.setup, model="m", observed="", ttft=found.ttft_ratio, tpot=found.tpot_ratio
        )
        factors.append(planned.costs.tpot_factor)

    assert factors[0] == 1
    assert factors == sorted(factors)
    assert factors[-1] == pytest.approx(1.4, rel=0.01)
    assert found.tpot_off == pytest.approx(1.0, abs=0.01)
    assert surprises(planned, found) == []


def test_what_the_plan_could_not_know_is_a_surprise_and_what_it_allows_for_is_not():
    errors = PLANNED.costs.efficiency.errors
    within = a_window(PLANNED, ttft=1 + 0.9 * errors.ttft, tpot=1 / (1 + 0.9 * errors.tpot))
    beyond = a_window(PLANNED, ttft=1.0, tpot=1.5)

    assert surprises(PLANNED, measured(PLANNED, [compare(PLANNED, within)])) == []
    [told] = surprises(PLANNED, measured(PLANNED, [compare(PLANNED, beyond)]))
    assert told.startswith("time per token is 50 % above predicted")


def test_what_ran_had_room_whatever_the_plan_thought_of_the_cache():
    """Where an engine's cache is larger than planned, no queue is predicted that was not there."""
    small = PLANNED.model_copy(update={"costs": replace(PLANNED.costs, kv_cache_tokens=1024)})
    window = a_window(PLANNED, concurrency=100.0)

    assert compare(small, window).tpot_ratio == pytest.approx(1.0)


def test_cpus_and_gpus_are_corrected_apart():
    cpu = a_candidate(device=a_cpu_device())
    calibration = Calibration().with_measured(
        a_planned_speed(cpu).setup, model="m", observed="", ttft=5.0, tpot=5.0
    )

    corrected = a_planned_speed(replace(cpu, calibration=calibration))
    other = a_planned_speed(a_candidate(device=a_gpu_device(), calibration=calibration))

    assert corrected.costs.tpot_factor > 2
    assert other.costs.tpot_factor == 1
