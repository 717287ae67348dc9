"""Predicted against observed speed: a window of an engine beside what was planned for its load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from placement.calibration import TOLERANCE
from placement.performance import latency_s
from placement.planned_speed import PlannedSpeed
from placement.speed_window import SpeedWindow

WINDOWS = 5  # whose median is one measurement: two bad ones among them do not move it far
_ROOM = 10**12


@dataclass(frozen=True, slots=True)
class Comparison:
    """One window. Ratios are observed over what the model alone predicts, uncorrected."""

    window: SpeedWindow
    predicted_ttft_s: float  # as planned
    predicted_tpot_s: float
    ttft_ratio: float
    tpot_ratio: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """What several windows of a variant say together."""

    ttft_ratio: float  # observed over the model's own prediction
    tpot_ratio: float
    ttft_off: float  # observed over planned
    tpot_off: float


def compare(planned: PlannedSpeed, window: SpeedWindow) -> Comparison:
    """Under exactly the window's load. As nobody waited in it, there was room for all."""
    costs = replace(planned.costs, kv_cache_tokens=_ROOM, max_num_seqs=_ROOM)
    ttft, tpot = latency_s(replace(costs, ttft_factor=1.0, tpot_factor=1.0), window.load)
    return Comparison(
        window=window,
        predicted_ttft_s=ttft * costs.ttft_factor,
        predicted_tpot_s=tpot * costs.tpot_factor,
        ttft_ratio=window.ttft_s / ttft,
        tpot_ratio=window.tpot_s / tpot,
    )


def measured(planned: PlannedSpeed, comparisons: Sequence[Comparison]) -> Measurement:
    """Medians of windows of the same variant."""
    ttft = median(each.ttft_ratio for each in comparisons)
    tpot = median(each.tpot_ratio for each in comparisons)
    return Measurement(
        ttft_ratio=ttft,
        tpot_ratio=tpot,
        ttft_off=ttft / planned.costs.ttft_factor,
        tpot_off=tpot / planned.costs.tpot_factor,
    )


def surprises(planned: PlannedSpeed, measurement: Measurement) -> list[str]:
    """What is further from the plan than predictions claim to be, in words."""
    errors = planned.costs.efficiency.errors
    pairs = (
        ("time to first token", measurement.ttft_off, errors.ttft),
        ("time per token", measurement.tpot_off, errors.tpot),
    )
    return [
        f"{name} is {_off(off)} predicted, which may be wrong by {100 * error:.0f} %"
        for name, off, error in pairs
        if abs(math.log(off)) > math.log1p(max(error, TOLERANCE))
    ]


def _off(ratio: float) -> str:
    return f"{100 * (ratio - 1):.0f} % above" if ratio > 1 else f"{100 * (1 - ratio):.0f} % below"
