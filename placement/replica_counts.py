"""How many replicas may run, and how their number follows the load."""

from __future__ import annotations

from typing import Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from placement.spec import Spec, mistake


class ReplicaBounds(Spec):
    """How many replicas may run. `min: 0` lets the model scale to zero."""

    min: NonNegativeInt = Field(default=1, description="0: the model may scale to zero.")
    max: PositiveInt = Field(default=1, description="At most so many.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            if "max" in self.model_fields_set:
                raise ValueError(f"min ({self.min}) is more than max ({self.max})")
            raise mistake(f"{self.min} is more than max, which is 1 unless given; give it", "min")
        return self


class ScalingPolicy(Spec):
    """How the replica count follows the load between `replicas.min` and `replicas.max`."""

    target_utilization: PositiveFloat = Field(
        default=0.7, le=1.0, description="Share of a replica's request slots that should be busy."
    )
    scale_up_delay_s: NonNegativeFloat = Field(
        default=1.0, description="Load must be high for this long."
    )
    scale_down_delay_s: NonNegativeFloat = Field(
        default=30.0, description="Load must be low for this long."
    )
    scale_to_zero_delay_s: NonNegativeFloat = Field(
        default=300.0, description="Idle for this long: to 0."
    )
