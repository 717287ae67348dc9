"""Engines whose true speed is known, and windows of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from placement.candidate import Candidate
from placement.performance import Load, latency_s, replica_speed
from placement.planned_speed import PlannedSpeed
from placement.replica_speed import speed_setup_of
from placement.speed_window import EngineCounters, Sample, SpeedWindow
from tests.placement.builders import a_candidate

NOTHING = EngineCounters(
    prompts=0, ttft_s=0, prompt_tokens=0, cached_tokens=0, intervals=0, intervals_s=0
)


def a_planned_speed(candidate: Candidate | None = None) -> PlannedSpeed:
    candidate = candidate or a_candidate()
    return PlannedSpeed(setup=speed_setup_of(candidate), costs=replica_speed(candidate))


def a_window(
    planned: PlannedSpeed, *, ttft: float = 1.0, tpot: float = 1.0, **changes: Any
) -> SpeedWindow:
    """Of an engine that takes `ttft` and `tpot` times as long as the model alone predicts."""
    fields: dict[str, Any] = {
        "number": 1,
        "duration_s": 20.0,
        "prompts": 100,
        "intervals": 12_000,
        "ttft_s": 1.0,
        "tpot_s": 1.0,
        "input_tokens": 900.0,
        "output_tokens": 121.0,
        "prefix_hit": 0.25,
        "concurrency": 12.0,
        "drift": 1.0,
        "waiting": 0.1,
    }
    window = SpeedWindow(**{**fields, **changes})
    costs = replace(planned.costs, ttft_factor=1.0, tpot_factor=1.0)
    first_s, next_s = latency_s(costs, window.load)
    return window.model_copy(update={"ttft_s": ttft * first_s, "tpot_s": tpot * next_s})


def samples_of(
    load: Load,
    *,
    ttft_s: float,
    tpot_s: float,
    seconds: float = 20.0,
    begin: EngineCounters = NOTHING,
    began_s: float = 1000.0,
) -> list[Sample]:
    """Twice a second, of an engine with a constant load and those speeds."""
    request_s = ttft_s + (load.output_tokens - 1) * tpot_s
    samples = []
    for number in range(round(2 * seconds) + 1):
        prompts = load.concurrency * number / 2 / request_s
        intervals = prompts * (load.output_tokens - 1)
        samples.append(
            Sample(
                at_s=began_s + number / 2,
                running=round(load.concurrency),
                waiting=0,
                counters=EngineCounters(
                    prompts=begin.prompts + prompts,
                    ttft_s=begin.ttft_s + prompts * ttft_s,
                    prompt_tokens=begin.prompt_tokens + prompts * load.input_tokens,
                    cached_tokens=begin.cached_tokens
                    + prompts * load.input_tokens * load.prefix_hit,
                    intervals=begin.intervals + intervals,
                    intervals_s=begin.intervals_s + intervals * tpot_s,
                ),
            )
        )
    return samples
