"""What engines reported, and what later plans make of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.calibration import Calibration, Correction, Ratio, SpeedObservation, setup_of
from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.observation import observe
from placement.performance import Load, predict, replica_speed
from placement.planner import make_plan
from tests.builders import a_shape, a_variant
from tests.placement.builders import a_candidate

WEIGHTS = a_shape().per_gpu.weights_bytes
TOKENS = a_shape().kv_cache_tokens
PER_TOKEN = a_shape().kv_bytes_per_token


def an_observation(*, weights: float = 1.0, tokens: float = 1.0, **changes):
    return observe(
        a_variant(**changes),
        weights_bytes=int(WEIGHTS * weights),
        kv_cache_tokens=int(TOKENS * tokens),
        observed="2026-11-22",
    )


@pytest.mark.parametrize(("weights", "tokens"), [(1.0, 1.0), (1.04, 1.0), (1.0, 0.96)])
def test_a_prediction_within_tolerance_is_no_news(weights: float, tokens: float):
    assert an_observation(weights=weights, tokens=tokens) is None


@pytest.mark.parametrize(("weights", "tokens"), [(1.06, 1.0), (0.9, 1.0), (1.0, 0.9), (1.0, 1.2)])
def test_a_prediction_that_is_off_is_kept(weights: float, tokens: float):
    assert an_observation(weights=weights, tokens=tokens) is not None


def test_an_engine_that_does_not_tell_is_no_news():
    nothing = observe(a_variant(), weights_bytes=None, kv_cache_tokens=None, observed="2026-11-22")

    assert nothing is None


def test_a_later_plan_has_exactly_the_measured_room():
    observation = an_observation(weights=1.1, tokens=0.8)
    setup = setup_of(a_shape(), checkpoint="none", gpu="cpu")

    correction = Calibration().with_observation(observation).correction(setup)

    assert correction.weights_bytes == int(WEIGHTS * 1.1) - WEIGHTS
    assert (
        correction.weights_bytes + correction.other_bytes
        == (TOKENS - int(TOKENS * 0.8)) * PER_TOKEN
    )


def test_what_data_parallel_copies_lack_is_shared_out_over_them():
    shape = a_shape(data_parallel_size=4)
    observation = an_observation(tokens=0.5, shape=shape)
    setup = setup_of(shape, checkpoint="none", gpu="cpu")

    correction = Calibration().with_observation(observation).correction(setup)

    assert correction.other_bytes == (TOKENS - TOKENS // 2) // 4 * PER_TOKEN


def test_without_a_measured_cache_only_weights_are_corrected():
    observation = observe(
        a_variant(), weights_bytes=2 * WEIGHTS, kv_cache_tokens=None, observed="2026-11-22"
    )
    setup = setup_of(a_shape(), checkpoint="none", gpu="cpu")

    correction = Calibration(observations=(observation,)).correction(setup)

    assert correction == Correction(weights_bytes=WEIGHTS, other_bytes=0)


def test_the_newest_observation_of_a_setup_counts_and_others_stay():
    calibration = (
        Calibration()
        .with_observation(an_observation(tokens=0.5))
        .with_observation(an_observation(tokens=0.5, checkpoint="other"))
        .with_observation(an_observation(tokens=0.7))
    )

    assert [o.setup.checkpoint for o in calibration.observations] == ["other", "none"]
    setup = setup_of(a_shape(), checkpoint="none", gpu="cpu")
    lost = (TOKENS - int(TOKENS * 0.7)) * PER_TOKEN
    assert calibration.correction(setup).other_bytes == lost


def test_another_setup_is_not_corrected():
    calibration = Calibration().with_observation(an_observation(tokens=0.5))
    elsewhere = setup_of(a_shape(tensor_parallel_size=2), checkpoint="none", gpu="cpu")

    assert calibration.correction(elsewhere) == Correction()


def a_plan_of(catalogue):
    fleet = FleetSpec(fleet="x", models=(FleetModel(name="chat", model="mixtral-8x7b"),))
    pool = Pool(name="h100", gpu="H100-SXM", gpus_per_node=8)
    [variant] = make_plan(fleet, Inventory(pools=(pool,)), catalogue).variants
    return variant


def test_the_next_plan_predicts_what_was_measured():
    catalogue = load_catalogue()
    first = a_plan_of(catalogue)
    weights = first.shape.per_gpu.weights_bytes + 3 * 2**30
    tokens = first.shape.kv_cache_tokens * 8 // 10
    observation = observe(
        first, weights_bytes=weights, kv_cache_tokens=tokens, observed="2026-11-22"
    )

    second = a_plan_of(catalogue.with_calibration(Calibration().with_observation(observation)))

    assert second.shape.tensor_parallel_size == first.shape.tensor_parallel_size
    assert second.shape.per_gpu.weights_bytes == weights
    assert second.shape.kv_cache_tokens == pytest.approx(tokens, rel=0.001)
    assert observe(second, weights_bytes=weights, kv_cache_tokens=tokens, observed="") is None


SETUP = setup_of(a_shape(), checkpoint="none", gpu="cpu")


def a_ratio(*ratios: float) -> Ratio:
    ratio = Ratio()
    for each in ratios:
        ratio = ratio.with_measured(each * 0.02, 0.02)
    return ratio


def test_nothing_measured_corrects_nothing():
    assert Ratio().corrected(0.2) == (1.0, 0.2)


def test_one_measurement_moves_a_prediction_and_many_settle_it():
    one, many = a_ratio(1.3).corrected(0.2), a_ratio(*([1.3] * 20)).corrected(0.2)

    assert 1.05 < one[0] < 1.2
    assert many[0] == pytest.approx(1.3, rel=0.01)
    assert many[1] < 0.25 * one[1] < 0.2


def test_measurements_that_scatter_move_it_less_and_leave_it_less_certain():
    steady, scattered = a_ratio(1.3, 1.3, 1.3), a_ratio(0.9, 1.3, 1.88)

    assert steady.mean == pytest.approx(scattered.mean, abs=0.01)
    assert scattered.corrected(0.2)[0] < steady.corrected(0.2)[0]
    assert scattered.corrected(0.2)[1] > steady.corrected(0.2)[1]


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_measuring_never_makes_a_prediction_less_certain(ratios: list[float], error: float):
    ratio = a_ratio(*ratios)
    factor, left = ratio.corrected(error)

    assert 0 <= left <= error
    assert min(0.0, ratio.mean) - 1e-9 <= math.log(factor) <= max(0.0, ratio.mean) + 1e-9


def test_a_setup_that_was_slower_is_predicted_slower_and_others_are_not():
    candidate = a_candidate()
    setup = setup_of(
        candidate, checkpoint=candidate.checkpoint.source, gpu=candidate.device.gpu.name
    )
    seen = SpeedObservation(
        setup=setup, model="m", observed="2026-11-22", tpot=a_ratio(*([1.5] * 30))
    )
    calibration = Calibration().with_speed(seen).with_observation(an_observation(weights=1.1))
    load = Load(8, 512, 128)

    plain = predict(replica_speed(candidate), load)
    slower = predict(replica_speed(replace(candidate, calibration=calibration)), load)
    other = replace(candidate, calibration=calibration, max_num_seqs=8)

    assert slower.tpot_ms == pytest.approx(1.5 * plain.tpot_ms, rel=0.02)
    assert slower.ttft_s == plain.ttft_s
    assert (slower.tpot_error or 0) < (plain.tpot_error or 0)
    assert predict(replica_speed(other), load).tpot_ms == pytest.approx(plain.tpot_ms, rel=0.02)


def test_the_newest_speed_of_a_setup_is_kept_in_the_file():
    old, new = (
        SpeedObservation(setup=SETUP, model="m", observed=day, tpot=a_ratio(1.2))
        for day in ("2026-11-21", "2026-11-22")
    )

    calibration = Calibration().with_speed(old).with_speed(new)

    assert calibration.speeds == (new,)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration
