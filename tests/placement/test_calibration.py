"""What engines reported, and what later plans make of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.calibration import (
    REMEMBERED,
    Calibration,
    Correction,
    Ratio,
    SpeedObservation,
)
from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.observation import observe
from placement.performance import Load, predict, replica_speed
from placement.planner import make_plan
from placement.replica_speed import speed_setup_of
from placement.serving_features import LoraLimits
from placement.setups import SpeedSetup, setup_of
from placement.spec import parse_yaml
from tests.builders import a_shape, a_variant
from tests.placement.builders import a_candidate, a_cpu_device, a_gpu_device

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
    assert many[1] < 0.3 * one[1] < 0.2


def test_measurements_that_scatter_move_it_less_and_leave_it_less_certain():
    steady, scattered = a_ratio(1.3, 1.3, 1.3), a_ratio(0.9, 1.3, 1.88)

    assert steady.mean == pytest.approx(scattered.mean, abs=0.01)
    assert scattered.corrected(0.2)[0] < steady.corrected(0.2)[0]
    assert scattered.corrected(0.2)[1] > steady.corrected(0.2)[1]


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_a_factor_lies_between_one_and_what_was_measured(ratios: list[float], error: float):
    ratio = a_ratio(*ratios)
    factor, left = ratio.corrected(error)

    assert min(0.0, ratio.mean) - 1e-9 <= math.log(factor) <= max(0.0, ratio.mean) + 1e-9
    assert left > 0


def test_the_error_bar_becomes_the_observed_spread():
    """Also where that is wider than the model's own error."""
    for spread, error in ((0.05, 0.2), (0.3, 0.06)):
        ratio = a_ratio(*[1.2 * math.exp(spread * sign) for sign in (-1, 1)] * (REMEMBERED // 2))

        assert ratio.corrected(error)[1] == pytest.approx(spread, rel=0.2)


def test_old_measurements_fade():
    """An engine's new release is slower: within a few hundred measurements the file knows."""
    ratio = a_ratio(*[1.0] * 500, *[1.4] * 5 * REMEMBERED)

    assert ratio.count == REMEMBERED
    assert math.exp(ratio.mean) == pytest.approx(1.4, rel=0.01)


LOAD = Load(8, 512, 128)


def a_seen(candidate, factor: float = 1.5) -> SpeedObservation:
    """Thirty measurements in which tokens took `factor` times as long as predicted."""
    return SpeedObservation(
        setup=speed_setup_of(candidate),
        model="m",
        observed="2026-11-22",
        tpot=a_ratio(*([factor] * 30)),
    )


def test_a_setup_that_was_slower_is_predicted_slower():
    candidate = a_candidate()
    calibration = Calibration().with_speed(a_seen(candidate))
    plain = predict(replica_speed(candidate), LOAD)
    slower = predict(replica_speed(replace(candidate, calibration=calibration)), LOAD)

    assert slower.tpot_ms == pytest.approx(1.5 * plain.tpot_ms, rel=0.02)
    assert slower.ttft_s == plain.ttft_s
    assert (slower.tpot_error or 0) < (plain.tpot_error or 0)
    assert slower.ttft_error == plain.ttft_error


SLOWER = a_candidate()
FP8 = SLOWER.checkpoint.model_copy(update={"precision": "fp8"})


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"checkpoint": FP8},
        {"kv_cache_dtype": "fp8"},
        {"device": a_gpu_device("H200-SXM")},
        {"device": a_cpu_device()},
        {"engine": "sim"},
        {"extra_args": ("--enforce-eager",)},
        {"lora": LoraLimits(max_loras=2)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_seen_of_one_setup_corrects_no_other(changes):
    calibration = Calibration().with_speed(a_seen(SLOWER))
    other = replace(SLOWER, **changes)

    assert predict(replica_speed(replace(other, calibration=calibration)), LOAD) == predict(
        replica_speed(other), LOAD
    )


def test_the_same_gpus_over_another_link_are_another_setup():
    nvlink = replace(SLOWER, tensor_parallel_size=2)
    pcie = replace(nvlink, device=a_gpu_device("H100-SXM", link="pcie"))

    assert speed_setup_of(nvlink) != speed_setup_of(pcie)


def test_limits_that_the_model_counts_itself_are_the_same_setup():
    calibration = Calibration().with_speed(a_seen(SLOWER))
    fewer = replace(SLOWER, max_num_seqs=8, calibration=calibration)

    assert replica_speed(fewer).tpot_factor == pytest.approx(1.5, rel=0.01)


def test_what_was_measured_against_other_constants_no_longer_counts():
    seen = a_seen(SLOWER).model_copy(update={"constants": "of-an-older-release"})

    assert Calibration().with_speed(seen).speed(seen.setup) is None


def test_simulated_engines_correct_nothing_not_even_simulations():
    simulated = replace(SLOWER, engine="sim")
    calibration = Calibration().with_speed(a_seen(simulated))

    assert calibration.speed(speed_setup_of(simulated)) is None


def test_the_newest_speed_of_a_setup_is_kept_and_the_file_is_bounded():
    setups = [speed_setup_of(replace(SLOWER, extra_args=(str(n),))) for n in range(300)]
    calibration = Calibration()
    for setup in (*setups, setups[-1]):
        calibration = calibration.with_measured(
            setup, model="m", observed="2026-11-22", ttft=1.1, tpot=1.2
        )

    assert [kept.setup for kept in calibration.speeds] == setups[-200:]
    assert [kept.tpot.count for kept in calibration.speeds] == [1] * 199 + [2]
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


OLD_FILE = """
observations:
- setup: {setup}
  model: mistral-small-3.2-24b-2506
  observed: '2026-10-01'
  kv_bytes_per_token: 163840
  predicted_weights_bytes: 47000000000
  measured_weights_bytes: 50000000000
  predicted_kv_cache_tokens: 122064
  measured_kv_cache_tokens: 110000
speeds:
- setup: {setup}
  model: mistral-small-3.2-24b-2506
  observed: '2026-10-01'
  tpot: {{count: 30, mean: 0.4, squares: 0.1}}
"""
OLD_SETUP = (
    "{checkpoint: repo, gpu: H100-SXM, engine: ENGINE, dtype: auto, kv_cache_dtype: auto, "
    "tensor_parallel_size: 1, pipeline_parallel_size: 1, data_parallel_size: 1, "
    "expert_parallel: false, max_num_seqs: 256, max_num_batched_tokens: 8192, "
    "gpu_memory_utilization: 0.92}"
)


@pytest.mark.parametrize(("engine", "known"), [("vllm", True), ("llamacpp", False)])
def test_a_file_from_before_precisions_were_told_loads(engine: str, *, known: bool):
    """It still counts, but for GGUF repositories, of whose precisions it may be any."""
    old = parse_yaml(
        OLD_FILE.format(setup=OLD_SETUP.replace("ENGINE", engine)), Calibration, source="old"
    )
    names = {"checkpoint": "repo", "gpu": "H100-SXM", "engine": engine, "precision": "q8_0"}
    setup = old.observations[0].setup.model_copy(update=names)
    speed = old.speeds[0].setup.model_copy(update=names)

    assert (old.correction(setup) != Correction()) == known
    assert (old.speed(speed) is not None) == known
    assert len(old.with_measured(speed, model="m", observed="", ttft=1, tpot=1).speeds) == 2 - known


def test_precisions_of_a_gguf_repository_are_calibrated_apart():
    fields = setup_of(a_shape(), checkpoint="repo-GGUF", gpu="L4").model_dump()
    q4, q8 = (
        SpeedSetup.model_validate({**fields, "engine": "llamacpp", "precision": precision})
        for precision in ("q4_k_m", "q8_0")
    )
    calibration = Calibration().with_measured(q4, model="m", observed="", ttft=1.0, tpot=1.4)

    assert calibration.speed(q4) is not None
    assert calibration.speed(q8) is None
