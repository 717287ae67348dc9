"""Explanation: why a plan is as it is, and what would change it, as a value."""

from __future__ import annotations

from pydantic import Field

from placement.spec import Spec


class Reason(Spec):
    """Why one model runs as it does."""

    model: str
    chosen: tuple[str, ...] = Field(description="Its variants, in words.")
    runner_up: str | None = Field(default=None, description="Without the chosen; None: nothing.")
    runner_up_costs: float | None = Field(
        default=None, description="More per hour of the whole plan."
    )
    binding: str = Field(description="What keeps a replica from carrying more.")
    roles: str | None = Field(
        default=None,
        description="With `disaggregate`: why there are prefill and decode replicas, or not.",
    )


class WhatIf(Spec):
    """One thing that could be different, and the plan then."""

    change: str
    effect: str
    cost_per_hour: float | None = Field(default=None, description="More, or less; None: no plan.")
    gpus: int = Field(default=0, description="More, or fewer.")


class WayOut(Spec):
    """A change that lets every model have what it needs."""

    change: str
    cost_per_hour: float = Field(description="Of the plan then.")


class Explanation(Spec):
    """Reasons, model by model; what would make the plan cheaper or dearer; ways out."""

    reasons: tuple[Reason, ...]
    what_if: tuple[WhatIf, ...] = ()
    ways_out: tuple[WayOut, ...] = Field(
        default=(), description="Of a fleet that does not fit, cheapest first."
    )
