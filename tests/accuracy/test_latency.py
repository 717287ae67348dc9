"""What the performance model promises on runs that it was not fitted to."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from placement.fitted import FITTED, KNOWN, LLAMACPP, LLAMACPP_ERROR, UNKNOWN
from tests.accuracy.calibrate import known_errors, unknown_errors
from tests.accuracy.fitting import fit
from tests.accuracy.folds import Score, by, folds, score, speed_report
from tests.accuracy.latency import kept, read_runs
from tests.accuracy.llamacpp_speed import fit_llamacpp, llamacpp_error
from tests.accuracy.max_throughput import read_throughputs
from tests.accuracy.other_gpus import read_speeds
from tests.accuracy.speed_baselines import SPEED_BASELINES

RUNS = read_runs()
KEPT = kept(RUNS)
FOLDS = folds()
each_fold = pytest.mark.parametrize("fold", FOLDS, ids=lambda fold: fold.name)


def test_every_model_and_every_gpu_type_is_held_out_once() -> None:
    names = {fold.name for fold in FOLDS}

    assert names == {f"model {run.model}" for run in KEPT} | {f"GPU {run.gpu}" for run in KEPT}
    assert sum(fold.runs for fold in FOLDS) == 2 * len(KEPT)


@each_fold
def test_time_per_token_within_ten_percent_on_average(fold: Score) -> None:
    assert fold.tpot <= 0.10


@each_fold
def test_time_to_first_token_within_thirty_percent_on_average(fold: Score) -> None:
    assert fold.ttft <= 0.30


@each_fold
def test_the_faster_configuration_is_known(fold: Score) -> None:
    assert fold.pairs > 90
    assert fold.order >= 0.95


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_it_does_not_hang_on_how_far_the_priors_are_trusted(width: float) -> None:
    for fold in folds(width):
        assert fold.tpot <= 0.10, fold.line()
        assert fold.ttft <= 0.30, fold.line()
        assert fold.order >= 0.95, fold.line()


def test_the_constants_follow_from_the_runs() -> None:
    assert astuple(fit(KEPT)) == pytest.approx(astuple(FITTED), rel=0.01)


def test_the_errors_that_predictions_carry_are_those_of_runs_not_fitted_to() -> None:
    assert astuple(known_errors()) == pytest.approx(astuple(KNOWN), abs=0.006)
    assert astuple(unknown_errors(FITTED)) == pytest.approx(astuple(UNKNOWN), abs=0.006)


def test_disturbed_runs_do_not_change_the_picture() -> None:
    disturbed = [run for run in RUNS if run.excluded.startswith("disturbed")]

    assert 0 < len(disturbed) < 0.05 * len(RUNS)
    assert score("", [*KEPT, *disturbed], by(FITTED)).tpot <= 0.05


@pytest.mark.parametrize("name", SPEED_BASELINES)
def test_no_other_formula_comes_as_close(name: str) -> None:
    theirs = score(name, KEPT, SPEED_BASELINES[name])

    assert max(fold.tpot for fold in FOLDS) < theirs.tpot / 2


def test_cached_prompts_explain_the_runs_of_the_smallest_model() -> None:
    runs = [run for run in RUNS if run.model == "llama-3.1-8b"]
    cached = [replace(run, load=replace(run.load, prefix_hit=0.8)) for run in runs]

    assert score("", cached, by(FITTED)).tpot < score("", runs, by(FITTED)).tpot / 4


def test_one_request_alone_on_gpus_and_models_that_nothing_was_fitted_to() -> None:
    alone = [
        each
        for each in read_speeds()
        if each.quantity == "tokens/s of one of 1 requests" and each.row.precision != "AWQ"
    ]

    assert {each.row.gpu for each in alone} == {"A100-40", "A100-80", "H100-80", "V100-32"}
    assert sum(abs(each.error) for each in alone) / len(alone) < 0.05


def test_llamacpp_follows_from_its_runs_too() -> None:
    constants = fit_llamacpp()

    assert astuple(constants) == pytest.approx(astuple(LLAMACPP), rel=0.01)
    assert llamacpp_error(constants) == pytest.approx(LLAMACPP_ERROR, abs=0.006)
    assert llamacpp_error(constants) < 0.15


def test_dense_models_have_the_published_throughput_of_another_engine_to_a_half() -> None:
    dense = [each for each in read_throughputs() if each.row.model.startswith("Llama")]

    assert len(dense) > 8
    for each in dense:
        assert abs(each.error) < 0.5, each.row.label


def test_what_is_left_out_is_said_with_its_reason() -> None:
    text = "\n".join(speed_report())

    for run in RUNS:
        assert not run.excluded or (run.excluded in text and run.label in text)
