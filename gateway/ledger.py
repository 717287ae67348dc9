"""Ledger: tokens used since the last flush, by tenant, model and day. Rows are what is kept of them."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal

from pydantic import Field, NonNegativeInt

from gateway.usage import Usage
from placement.spec import Spec

_DAY_S = 86400
Period = Literal["day", "month"]


class UsageRow(Spec):
    """What one tenant used of one model on one day (UTC)."""

    tenant: str
    model: str
    day: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    requests: NonNegativeInt = 0
    prompt_tokens: NonNegativeInt = 0
    completion_tokens: NonNegativeInt = 0
    estimated_tokens: NonNegativeInt = Field(
        0, description="Of these tokens, those that were counted here: the engine did not tell."
    )


class UsageReport(Spec):
    """Rows on their way to the controller. One that is repeated counts once."""

    source: str = Field(min_length=8, description="Random, of the gateway that sends it.")
    sequence: NonNegativeInt = Field(description="Grows with every new report of a source.")
    rows: tuple[UsageRow, ...] = ()


class Spent(Spec):
    """What a tenant has used in its present period."""

    period: str
    tokens: NonNegativeInt


class Ledger:
    """Adds up until `take`. `wall_clock` gives seconds since the epoch."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._day_number, self._day = -1.0, ""
        self._sums: dict[tuple[str, str, str], list[int]] = {}

    def add(self, tenant: str, model: str, usage: Usage, *, estimated: bool) -> None:
        """A request is over."""
        number = self._wall_clock() // _DAY_S
        if number != self._day_number:
            self._day_number, self._day = number, _day_text(int(number))
        key = (tenant, model, self._day)
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = [0, 0, 0, 0]
        sums[0] += 1
        sums[1] += usage.prompt_tokens
        sums[2] += usage.completion_tokens
        if estimated:
            sums[3] += usage.prompt_tokens + usage.completion_tokens

    def take(self) -> tuple[UsageRow, ...]:
        """All since the last call."""
        sums, self._sums = self._sums, {}
        return tuple(
            UsageRow(
                tenant=tenant,
                model=model,
                day=day,
                requests=requests,
                prompt_tokens=prompt,
                completion_tokens=completion,
                estimated_tokens=estimated,
            )
            for (tenant, model, day), (requests, prompt, completion, estimated) in sums.items()
        )


def day_of(wall: float) -> str:
    """The day (UTC) of a time in seconds since the epoch, as 2026-11-22."""
    return _day_text(int(wall // _DAY_S))


def period_of(wall: float, period: Period) -> str:
    """As `day_of`, or its month: 2026-11."""
    day = day_of(wall)
    return day if period == "day" else day[:7]


def period_end_s(wall: float, period: Period) -> float:
    """When the period of `wall` ends, in seconds since the epoch."""
    now = datetime.fromtimestamp(wall, UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return (midnight + timedelta(days=1)).timestamp()
    days = calendar.monthrange(now.year, now.month)[1]
    return (midnight.replace(day=1) + timedelta(days=days)).timestamp()


@lru_cache(maxsize=4)
def _day_text(number: int) -> str:
    return datetime.fromtimestamp(number * _DAY_S, UTC).date().isoformat()
