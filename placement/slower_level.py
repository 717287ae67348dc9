"""The service level that a model could have where it cannot have the one that is wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from placement.capacity import DEFAULT_DEMAND, ttft_p95_s
from placement.fleet import FleetModel, Objective
from placement.option import SPEED_ERROR, Option, as_stressed, carried, replicas_needed

_STEP = 1.1  # a level is that much slower than the one tried before
_ROUNDS = 40
_SOME = 4  # steps, where no number of them is enough


@dataclass(frozen=True, slots=True)
class Slower:
    """An option as it is at a slower service level."""

    option: Option
    level: Objective
    factor: float  # slower than wanted, of the promise that must be eased most


def slower_level(option: Option, wish: FleetModel, replicas: int, *, certain: bool) -> Slower:
    """The level at which so many replicas of `option` carry the demand, promises eased step by step.

    Where no level lets them, one at which a replica runs some requests at once. `certain`: as for
    `robust: require`.
    """
    level = _of_one_request(option, wish, certain=certain)
    tried = []
    for _ in range(_ROUNDS):
        found = _at(option, wish, _rounded(level), certain=certain)
        if found.option.capacity.concurrency:
            tried.append(found)
            if found.option.replicas_needed <= replicas:
                return found
        level = _eased(level, found.option.capacity.broken_promise)
    return tried[min(_SOME, len(tried) - 1)] if tried else found


def _of_one_request(option: Option, wish: FleetModel, *, certain: bool) -> Objective:
    """What is wanted, or what a request that is alone gets if that is slower."""
    error = 1 - SPEED_ERROR if certain else 1.0
    prediction, slo = option.capacity.prediction, wish.slo
    ttft = ttft_p95_s(option.speed, prediction, wish.demand or DEFAULT_DEMAND)
    return Objective(
        ttft_p95_s=slo.ttft_p95_s and max(slo.ttft_p95_s, ttft / error),
        tpot_p95_ms=slo.tpot_p95_ms and max(slo.tpot_p95_ms, prediction.tpot_ms / error),
    )


def _eased(level: Objective, broken: str) -> Objective:
    """Slower in the promise that is broken; in both where it is not known which."""
    given = {name: value for name, value in level.model_dump().items() if value is not None}
    these = [name for name in given if broken.startswith(name)] or list(given)
    return level.model_copy(update={name: given[name] * _STEP for name in these})


def _rounded(level: Objective) -> Objective:
    ttft, tpot = level.ttft_p95_s, level.tpot_p95_ms
    return Objective(
        ttft_p95_s=ttft and math.ceil(ttft * 100) / 100, tpot_p95_ms=tpot and float(math.ceil(tpot))
    )


def _at(option: Option, wish: FleetModel, level: Objective, *, certain: bool) -> Slower:
    slower = wish.model_copy(update={"slo": level})
    if certain:
        there = as_stressed(option, slower)
    else:
        capacity = carried(slower, option.candidate, option.speed, level)
        there = replace(option, capacity=capacity, replicas_needed=replicas_needed(wish, capacity))
    factors = [
        eased / wanted
        for eased, wanted in (
            (level.ttft_p95_s, wish.slo.ttft_p95_s),
            (level.tpot_p95_ms, wish.slo.tpot_p95_ms),
        )
        if eased is not None and wanted is not None
    ]
    return Slower(there, level, max(factors, default=1.0))
