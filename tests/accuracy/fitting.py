"""The performance model's constants by least squares; `calibrate.py` writes them down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from placement.fitted import Constants
from tests.accuracy.latency import Run

Vector = NDArray[np.float64]

# What kernel tables say of H100 and H200 (PLANNING.md), with how well that tells what is left of it
# in an engine, as a standard deviation of the logarithm. Small kernels, and what requests and steps
# cost the host: RTX 4090 tables and guesses, so wide.
PRIORS: Mapping[str, tuple[float, float]] = {
    "weight_bandwidth": (0.80, 0.15),
    "expert_bandwidth": (0.80, 0.4),
    "kv_bandwidth": (0.75, 0.3),
    "flops": (0.77, 0.2),
    "expert_flops": (0.25, 0.5),
    "attention_flops": (0.55, 0.3),
    "step_s": (0.6e-3, 0.5),
    "kernel_s": (3e-6, 0.4),
    "sequence_s": (10e-6, 0.5),
    "request_s": (30e-3, 0.3),
    "routing_evenness": (0.85, 0.2),
    "all_reduce_s": (4.4e-6, 0.4),
    "all_reduce_doubling_s": (0.5e-6, 1.0),
    "two_shot_s": (5e-6, 1.0),
    "together": (0.12, 0.3),
}
_TPOT_SIGMA = 0.05  # of the logarithm: how well one run can be known
_TTFT_SIGMA = 0.15
_OUTLIER = 1.5  # sigmas, from where on a residual counts as its root (Huber)
_STEPS = 25
_CONVERGED = 1e-5


def fit(runs: Sequence[Run], *, prior_width: float = 1.0) -> Constants:
    """Constants that explain `runs` best: Levenberg-Marquardt on logarithms, pulled to `PRIORS`.

    `prior_width`: how many times as wide the priors are taken to be.
    """
    centre = np.log([PRIORS[field.name][0] for field in fields(Constants)])
    width = prior_width * np.array([PRIORS[field.name][1] for field in fields(Constants)])

    def residuals(logarithms: Vector) -> Vector:
        errors = _errors(runs, constants_of(logarithms))
        size = np.abs(errors)
        dampened = np.sqrt(_OUTLIER * np.maximum(size, 1e-9))
        bounded = np.where(size > _OUTLIER, np.sign(errors) * dampened, errors)
        return np.concatenate([bounded, (logarithms - centre) / width])

    position, trust = centre.copy(), 1e-2
    errors = residuals(position)
    for _ in range(_STEPS):
        slopes = _slopes(residuals, position, errors)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + trust * np.diag(np.diag(normal)), -slopes.T @ errors)
        tried = position + np.clip(step, -0.5, 0.5)
        found = residuals(tried)
        gain = errors @ errors - found @ found
        if gain <= 0:
            trust *= 10
            continue
        position, errors, trust = tried, found, max(trust / 5, 1e-9)
        if gain < _CONVERGED * (errors @ errors):
            break
    return constants_of(position)


def constants_of(logarithms: Vector) -> Constants:
    """Constants from the logarithms of their values, in the order of their fields."""
    return Constants(*(float(value) for value in np.exp(logarithms)))


def _slopes(residuals: Callable[[Vector], Vector], position: Vector, errors: Vector) -> Vector:
    columns = []
    for index in range(len(position)):
        moved = position.copy()
        moved[index] += 1e-4
        columns.append((residuals(moved) - errors) / 1e-4)
    return np.stack(columns, axis=1)


def _errors(runs: Sequence[Run], constants: Constants) -> Vector:
    errors = []
    for run in runs:
        predicted = run.predicted(constants)
        errors.append(np.log(predicted.tpot_ms / run.tpot_ms) / _TPOT_SIGMA)
        errors.append(np.log(predicted.ttft_s / run.ttft_s) / _TTFT_SIGMA)
    return np.array(errors)
