"""Migration: what a deploy would change, as a value that is shown, sent and carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from placement.spec import Spec


class _Change(Spec):
    model: str
    variant: str
    pool: str
    bytes_to_load: int = Field(default=0, description="Weights, over all replicas that start.")
    load_s: float = Field(default=0.0, description="From its start until the new replicas serve.")
    reduced_capacity_s: float = Field(
        default=0.0, description="For so long its model carries less than was promised."
    )
    cost_per_hour: float = Field(default=0.0, description="More, or less, from then on.")


class Create(_Change):
    """Replicas of a variant that did not run."""

    kind: Literal["create"] = "create"
    replicas: int


class Resize(_Change):
    """More or fewer replicas of a variant that runs."""

    kind: Literal["resize"] = "resize"
    before: int
    after: int


class Replace(_Change):
    """Replicas of a variant that runs, in another form or on other GPUs."""

    kind: Literal["replace"] = "replace"
    replicas: int
    why: str


class Delete(_Change):
    """Replicas of a variant that is not wanted any more."""

    kind: Literal["delete"] = "delete"
    replicas: int


Change = Create | Resize | Replace | Delete


class ModelChange(Spec):
    """A model before and after; latencies are those of its slowest variant, None: it has none."""

    model: str
    replicas_before: int
    replicas_after: int
    requests_per_s_before: float = Field(description="That its replicas carry.")
    requests_per_s_after: float
    ttft_p95_s_before: float | None
    ttft_p95_s_after: float | None
    tpot_p95_ms_before: float | None
    tpot_p95_ms_after: float | None
    cost_per_hour_before: float
    cost_per_hour_after: float
    adapters_before: Mapping[str, str] = Field(
        default_factory=dict, description="Names and sources."
    )
    adapters_after: Mapping[str, str] = Field(default_factory=dict)


class Migration(Spec):
    """What a deploy would change, in order, and what it costs."""

    fleet: str
    status: Literal["optimal", "feasible", "infeasible"] = Field(description="Of the wanted plan.")
    changes: tuple[Annotated[Change, Field(discriminator="kind")], ...]
    bytes_to_load: int
    duration_s: float = Field(description="When each change waits for the one before.")
    reduced_capacity_s: float
    cost_per_hour_before: float
    cost_per_hour_after: float
    currency: str
    models: tuple[ModelChange, ...]
