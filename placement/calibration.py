"""Calibration: what engines were seen to need and to do, so that the next prediction is right.

An engine tells its weights and its KV cache when it starts. Where that differs from the prediction
by more than `TOLERANCE`, an observation is kept; later plans for the same model on the same ranks
take the measured weights, and what the KV cache fell short by as memory that something else takes.

Measured times are kept as the mean and variance of ln(measured / predicted), where the prediction is
always the model's own, never a corrected one: corrections do not feed on themselves. A prediction is
off by a factor whose logarithm has the model's own error e as standard deviation, before anything is
measured. After n measurements of mean m, which scatter by s, the factor is exp(w m) with
w = n e^2 / (n e^2 + s^2) (normal mean with a normal prior: Gelman et al., Bayesian Data Analysis,
3rd edition, eq. 2.11 and 2.12): few or scattered measurements leave it near 1.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from placement.fitted import FITTED, LLAMACPP, Errors
from placement.setups import Setup, SpeedSetup
from placement.spec import Spec

TOLERANCE = 0.05  # below this the memory model is as good as it claims to be
KEPT = 500  # observations in a file; the oldest go first
KEPT_SPEEDS = 200  # the same of speeds
REMEMBERED = 50  # measurements of a speed that count; older ones fade
CONSTANTS = f"{zlib.crc32(repr((FITTED, LLAMACPP)).encode()):08x}"  # that predictions follow from


class Observation(Spec):
    """One engine start: predicted and measured."""

    setup: Setup = Field(description="Which engines it is true of.")
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


@dataclass(frozen=True, slots=True)
class SpeedCorrection:
    """Errors that predictions are left with, and factors that they are multiplied by."""

    errors: Errors
    ttft: float = 1.0
    tpot: float = 1.0


class Ratio(Spec):
    """Measured over predicted, in logarithms: a count, their mean, and the squares about it."""

    count: NonNegativeInt = Field(default=0, description="Measurements that still count.")
    mean: float = Field(default=0.0, description="Of ln(measured / predicted).")
    squares: NonNegativeFloat = Field(default=0.0, description="Sum of those about the mean.")

    def with_measured(self, measured: float, predicted: float) -> Ratio:
        """One measurement more (Welford), of which the last `REMEMBERED` weigh most."""
        kept = min(self.count, REMEMBERED - 1)
        squares = self.squares * kept / self.count if self.count else 0.0
        value, count = math.log(measured / predicted), kept + 1
        mean = self.mean + (value - self.mean) / count
        squares += (value - self.mean) * (value - mean)
        return Ratio(count=count, mean=mean, squares=squares)

    def corrected(self, error: float) -> tuple[float, float]:
        """Factor for the next prediction, and its relative error, from one of `error` without it.

        What is left is how measurements scatter, and what is not known of their mean.
        """
        if self.count == 0 or error <= 0:
            return 1.0, error
        # As if one more measurement had scattered by the model's error.
        scatter = (self.squares + error**2) / (self.count + 1)
        weight = self.count * error**2 / (self.count * error**2 + scatter)
        return math.exp(weight * self.mean), math.sqrt(scatter + error**2 * (1 - weight))


class SpeedObservation(Spec):
    """How fast engines of a setup were, against what was predicted for the load that they had."""

    setup: SpeedSetup = Field(description="Which engines it is true of.")
    model: str = Field(description="The catalogue's name.")
    observed: str = Field(description="Date of the newest measurement, ISO 8601.")
    constants: str = Field(
        default="", description="Checksum of the model's; with others this no longer counts."
    )
    ttft: Ratio = Field(default=Ratio(), description="Time to first token.")
    tpot: Ratio = Field(default=Ratio(), description="Time per further token.")


class Calibration(Spec):
    """The calibration file: one observation a setup, the newest, and one of its speed."""

    observations: tuple[Observation, ...] = Field(
        default=(), description="Memory, where it was more than 5 % off."
    )
    speeds: tuple[SpeedObservation, ...] = Field(default=(), description="Of the last 200 setups.")

    def with_observation(self, observation: Observation) -> Calibration:
        """A calibration that also knows `observation`, in place of an older one of its setup."""
        others = [kept for kept in self.observations if not kept.setup.holds_for(observation.setup)]
        return self.model_copy(update={"observations": (*others, observation)[-KEPT:]})

    def with_speed(self, observation: SpeedObservation) -> Calibration:
        """A calibration that also knows how fast a setup was, in place of an older one of it."""
        others = [kept for kept in self.speeds if not kept.setup.holds_for(observation.setup)]
        return self.model_copy(update={"speeds": (*others, observation)[-KEPT_SPEEDS:]})

    def with_measured(
        self, setup: SpeedSetup, *, model: str, observed: str, ttft: float, tpot: float
    ) -> Calibration:
        """One more measurement of a setup: `ttft` and `tpot` over the model's own predictions."""
        seen = self.speed(setup)
        before = (seen.ttft, seen.tpot) if seen else (Ratio(), Ratio())
        return self.with_speed(
            SpeedObservation(
                setup=setup,
                model=model,
                observed=observed,
                constants=CONSTANTS,
                ttft=before[0].with_measured(ttft, 1.0),
                tpot=before[1].with_measured(tpot, 1.0),
            )
        )

    def speed(self, setup: SpeedSetup) -> SpeedObservation | None:
        """How fast `setup` was, if that was ever seen. What is simulated says nothing."""
        if setup.engine == "sim":
            return None
        for kept in self.speeds:
            if kept.constants in ("", CONSTANTS) and kept.setup.holds_for(setup):
                return kept
        return None

    def speed_correction(self, setup: SpeedSetup, errors: Errors) -> SpeedCorrection:
        """Of predictions of `setup`, which alone are off by `errors`."""
        seen = self.speed(setup)
        if seen is None:
            return SpeedCorrection(errors)
        ttft, ttft_error = seen.ttft.corrected(errors.ttft)
        tpot, tpot_error = seen.tpot.corrected(errors.tpot)
        return SpeedCorrection(Errors(tpot=tpot_error, ttft=ttft_error), ttft, tpot)

    def correction(self, setup: Setup) -> Correction:
        """What is known of `setup`; nothing to correct if it was never seen."""
        for observation in reversed(self.observations):
            if observation.setup.holds_for(setup):
                return _correction(observation)
        return Correction()


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
