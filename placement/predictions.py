"""What users of a plan's variants will see, when the demand is shared out over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from placement.capacity import DEFAULT_DEMAND, concurrency_for, load_at, ttft_p95_s
from placement.fleet import Demand, FleetModel
from placement.option import Option
from placement.performance import predict
from placement.plan import Predicted
from placement.role_capacity import decode_tpot_ms, prefill_ttft_p95_s
from placement.roles import together


class Chosen(Protocol):
    """An option with the replicas that it gets."""

    @property
    def option(self) -> Option:
        """What each replica is."""

    @property
    def replicas(self) -> int:
        """How many."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """A model's demand, as its replicas get it."""

    demand: Demand
    total: float  # requests/s that all carry
    by_roles: float  # requests/s of it that prefill and decode replicas carry together
    prefill: Chosen | None = None
    decode: Chosen | None = None

    @classmethod
    def of(cls, wish: FleetModel, chosen: Sequence[Chosen]) -> ModelLoad:
        """Shared out by what each carries."""
        rates = [
            (each.option.candidate.role, each.replicas * each.option.capacity.requests_per_s)
            for each in chosen
        ]
        side = {each.option.candidate.role: each for each in chosen}
        return cls(
            demand=wish.demand or DEFAULT_DEMAND,
            total=together(rates),
            by_roles=together(rate for rate in rates if rate[0] != "whole"),
            prefill=side.get("prefill"),
            decode=side.get("decode"),
        )

    def rate_of(self, chosen: Chosen) -> float:
        """Requests/s that come to a replica in a role."""
        if not self.total or not chosen.replicas:
            return self.demand.requests_per_s
        return self.demand.requests_per_s * self.by_roles / self.total / chosen.replicas


def predicted(option: Option, load: ModelLoad) -> Predicted:
    """Of one variant; without a demand, one user alone."""
    if option.candidate.role != "whole":
        return _predicted_in_role(option, load)
    demand, carried = load.demand, option.capacity.requests_per_s
    rate = demand.requests_per_s
    if load.total:
        rate = demand.requests_per_s * carried / load.total
    concurrency = concurrency_for(
        option.speed, rate_per_s=rate, at_most=option.capacity.concurrency, demand=demand
    )
    prediction = predict(option.speed, load_at(demand, concurrency))
    return Predicted(
        ttft_p95_s=ttft_p95_s(option.speed, prediction, demand),
        tpot_p95_ms=prediction.tpot_ms,
        utilization=rate / carried,
    )


def _predicted_in_role(option: Option, load: ModelLoad) -> Predicted:
    """Both sides' users are the same: the first token takes both, the others the decode side."""
    assert load.prefill is not None  # noqa: S101 - of a pair both are chosen
    assert load.decode is not None  # noqa: S101
    reading, writing = load.prefill.option, load.decode.option
    mine = load.prefill if option.candidate.role == "prefill" else load.decode
    return Predicted(
        ttft_p95_s=prefill_ttft_p95_s(
            reading.speed,
            load.demand,
            reading.handover,
            rate_per_s=load.rate_of(load.prefill),
        ),
        tpot_p95_ms=decode_tpot_ms(
            writing.speed,
            load.demand,
            rate_per_s=load.rate_of(load.decode),
            at_most=writing.capacity.concurrency,
        ),
        utilization=load.rate_of(mine) / option.capacity.requests_per_s,
    )
