"""What the performance model promises on runs that it was not fitted to."""

from __future__ import annotations

from statistics import mean, median

import pytest

from tests.accuracy.latency import Run, latency_report, order_kept, read_runs

RUNS = read_runs()
KEPT = [run for run in RUNS if not run.excluded]


def runs_of(model: str) -> list[Run]:
    return [run for run in KEPT if run.group.startswith(model)]


@pytest.mark.parametrize(
    ("model", "most"),
    [("llama-3.1-70b", 0.06), ("deepseek-v3", 0.08), ("minimax-m2.5", 0.15), ("gpt-oss", 0.16)],
)
def test_time_per_token_on_average(model: str, most: float) -> None:
    assert mean(abs(run.tpot_error) for run in runs_of(model)) < most


def test_time_to_first_token_of_the_model_that_was_fitted() -> None:
    assert median(abs(run.ttft_error) for run in runs_of("llama-3.1-70b")) < 0.15


def test_time_to_first_token_of_the_others_on_vllm() -> None:
    others = [run for run in KEPT if " vllm " in run.group and "70b" not in run.group]

    assert median(abs(run.ttft_error) for run in others) < 0.40


def test_the_faster_configuration_is_known() -> None:
    share, pairs = order_kept(KEPT)

    assert pairs > 1000
    assert share > 0.95


def test_what_is_left_out_is_said() -> None:
    text = "\n".join(latency_report(RUNS))

    assert all(run.label in text for run in RUNS if run.excluded)
