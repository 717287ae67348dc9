"""Calibration: what engines were seen to need and to do, so that the next prediction is right.

An engine tells its weights and its KV cache when it starts. Where that differs from the prediction
by more than `TOLERANCE`, an observation is kept; later plans for the same model on the same ranks
take the measured weights, and what the KV cache fell short by as memory that something else takes.

Measured times are kept as the mean and variance of ln(measured / predicted). A prediction is off by
a factor whose logarithm has the model's own error as standard deviation, before anything is
measured; each measurement moves it, the more the less measurements scatter (Bayes, normal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from placement.spec import Spec

TOLERANCE = 0.05  # below this the memory model is as good as it claims to be
KEPT = 500  # observations in a file; the oldest go first


class Ranks(Protocol):
    """What a candidate and a planned shape have in common: the fields of a setup."""

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share each layer."""
        ...


class Setup(Spec):
    """What decides how much memory a rank has left for its KV cache, besides the memory model."""

    checkpoint: str
    gpu: str
    engine: Literal["vllm", "llamacpp", "sim"]
    dtype: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    expert_parallel: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float


class Observation(Spec):
    """One engine start: predicted and measured."""

    setup: Setup
    model: str = Field(description="The catalogue's name.")
    observed: str = Field(description="Date, ISO 8601.")
    kv_bytes_per_token: int = Field(description="Per rank.")
    predicted_weights_bytes: int = Field(description="Per rank.")
    measured_weights_bytes: int | None = None
    predicted_kv_cache_tokens: int
    measured_kv_cache_tokens: int | None = None

    @property
    def error(self) -> float:
        """The larger relative error of weights and KV cache; 0 where nothing was measured."""
        pairs = (
            (self.predicted_weights_bytes, self.measured_weights_bytes),
            (self.predicted_kv_cache_tokens, self.measured_kv_cache_tokens),
        )
        return max((abs(p / m - 1) for p, m in pairs if m), default=0.0)


@dataclass(frozen=True, slots=True)
class Correction:
    """What measurement adds to (or takes from) a rank's predicted memory, bytes."""

    weights_bytes: int = 0
    other_bytes: int = 0  # not weights and not KV cache


class Ratio(Spec):
    """Measured over predicted, in logarithms: a count, their mean, and the squares about it."""

    count: NonNegativeInt = 0
    mean: float = 0.0
    squares: NonNegativeFloat = 0.0

    def with_measured(self, measured: float, predicted: float) -> Ratio:
        """One measurement more (Welford)."""
        value, count = math.log(measured / predicted), self.count + 1
        mean = self.mean + (value - self.mean) / count
        squares = self.squares + (value - self.mean) * (value - mean)
        return Ratio(count=count, mean=mean, squares=squares)

    def corrected(self, error: float) -> tuple[float, float]:
        """Factor for the next prediction, and its relative error, from one of `error` without it."""
        if self.count == 0 or error <= 0:
            return 1.0, error
        # As if one more measurement had scattered by the model's error.
        scatter = (self.squares + error**2) / (self.count + 1)
        weight = self.count * error**2 / (self.count * error**2 + scatter)
        return math.exp(weight * self.mean), error * math.sqrt(1 - weight)


class SpeedObservation(Spec):
    """How fast engines of a setup were, against what was predicted for the load that they had."""

    setup: Setup
    model: str = Field(description="The catalogue's name.")
    observed: str = Field(description="Date of the newest measurement, ISO 8601.")
    ttft: Ratio = Ratio()
    tpot: Ratio = Ratio()


class Calibration(Spec):
    """The calibration file: one observation a setup, the newest, and one of its speed."""

    observations: tuple[Observation, ...] = ()
    speeds: tuple[SpeedObservation, ...] = ()

    def with_observation(self, observation: Observation) -> Calibration:
        """A calibration that also knows `observation`, in place of an older one of its setup."""
        others = [kept for kept in self.observations if kept.setup != observation.setup]
        return self.model_copy(update={"observations": (*others, observation)[-KEPT:]})

    def with_speed(self, observation: SpeedObservation) -> Calibration:
        """A calibration that also knows how fast a setup was, in place of an older one of it."""
        others = [kept for kept in self.speeds if kept.setup != observation.setup]
        return self.model_copy(update={"speeds": (*others, observation)[-KEPT:]})

    def speed(self, setup: Setup) -> SpeedObservation | None:
        """How fast `setup` was, if that was ever seen."""
        return next((kept for kept in self.speeds if kept.setup == setup), None)

    def correction(self, setup: Setup) -> Correction:
        """What is known of `setup`; nothing to correct if it was never seen."""
        for observation in reversed(self.observations):
            if observation.setup == setup:
                return _correction(observation)
        return Correction()


def setup_of(ranks: Ranks, *, checkpoint: str, gpu: str) -> Setup:
    """The setup of a candidate or of a planned shape."""
    names = Setup.model_fields.keys() - {"checkpoint", "gpu"}
    return Setup(checkpoint=checkpoint, gpu=gpu, **{name: getattr(ranks, name) for name in names})


def _correction(observation: Observation) -> Correction:
    predicted, measured = observation.predicted_weights_bytes, observation.measured_weights_bytes
    weights = 0 if measured is None else measured - predicted
    if observation.measured_kv_cache_tokens is None:
        return Correction(weights_bytes=weights)
    missing_tokens = observation.predicted_kv_cache_tokens - observation.measured_kv_cache_tokens
    # A rank of each data-parallel copy lacks its share of them.
    missing_tokens = missing_tokens // observation.setup.data_parallel_size
    missing_bytes = missing_tokens * observation.kv_bytes_per_token
    return Correction(weights_bytes=weights, other_bytes=missing_bytes - weights)
