"""RoutingPolicy: how a model's requests are spread over its replicas, as an operator writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from placement.spec import Spec

PolicyName = Literal["auto", "least_load", "prefix", "session", "round_robin", "random"]
Role = Literal["whole", "prefill", "decode"]  # of a request's work, what a replica does
# Of a prompt, and not cached: fewer are read by the replica that answers, unless a gateway is told
# otherwise.
PREFILL_MIN_TOKENS = 512


class RoutingPolicy(Spec):
    """How requests are spread over the replicas of a model."""

    policy: PolicyName = Field(
        default="auto",
        description="`auto`: least predicted time, where cached prompts are free and sessions"
        " stay; `least_load`: largest share of free places; `prefix`, `session`: same prompt"
        " or `x-session-id`, same replica, while it is not overloaded.",
    )
    weights: Mapping[str, NonNegativeFloat] = Field(
        default_factory=dict,
        description="Variant: its share of the requests, for canaries; variants not named get"
        " requests only when none of the named can. Empty: by load.",
    )
    load_factor: float = Field(
        default=1.25,
        ge=1.0,
        description="A replica is overloaded for `prefix` and `session` beyond this many times"
        " the mean load.",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.weights and not any(self.weights.values()):
            raise ValueError("weights are all 0, so that no variant would get requests")
        return self
