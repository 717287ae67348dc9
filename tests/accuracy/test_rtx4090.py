"""An RTX 4090, of which nothing was fitted but its share of bandwidth and FLOPs."""

from __future__ import annotations

from statistics import mean

import pytest

from placement.efficiency import efficiency_of
from placement.fitted import FITTED
from placement.performance import step_s
from tests.accuracy.rtx4090 import (
    STEPS,
    bandwidth_share,
    decode_s,
    flops_share,
    kernel_s,
    kv_bandwidth_share,
    ours,
)
from tests.placement.builders import a_candidate, a_gpu_device


def gpu_part_s(batch: int, context: int) -> float:
    speed = ours()
    host = speed.efficiency.step_s + batch * speed.efficiency.sequence_s
    return step_s(speed, concurrency=batch, context=context) - host


@pytest.mark.parametrize(("batch", "context"), STEPS)
def test_a_step_takes_the_sum_of_its_kernels(batch: int, context: int) -> None:
    assert gpu_part_s(batch, context) == pytest.approx(decode_s(batch, context), rel=0.13)


def test_steps_take_the_sum_of_their_kernels_within_five_percent_on_average() -> None:
    assert mean(abs(gpu_part_s(*step) / decode_s(*step) - 1) for step in STEPS) < 0.05


def test_the_shares_that_other_generations_are_scaled_by_are_those_of_the_tables() -> None:
    ada = efficiency_of(a_candidate(device=a_gpu_device("RTX-4090")))
    hopper = efficiency_of(a_candidate(device=a_gpu_device("H100-SXM")))

    assert ada.bandwidth / hopper.bandwidth == pytest.approx(bandwidth_share() / 0.79, rel=0.01)
    assert ada.flops / hopper.flops == pytest.approx(flops_share() / 0.77, rel=0.01)


def test_a_small_kernel_takes_as_long_as_runs_on_hopper_say() -> None:
    assert kernel_s() == pytest.approx(FITTED.kernel_s, rel=0.15)


def test_the_cache_is_read_as_fast_as_weights() -> None:
    assert kv_bandwidth_share() == pytest.approx(bandwidth_share(), rel=0.05)
