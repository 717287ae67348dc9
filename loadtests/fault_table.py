"""What a death may cost, what it did cost, and the table of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loadtests.processes import CannotRun
from loadtests.steady_streams import SteadyStreams

HEADER = (
    "| death | no request there after s (limit) | full capacity after s (limit) | requests "
    "| failed | restarted | holds |\n| --- | ---: | ---: | ---: | ---: | --- | --- |"
)
GRACE_S = 5.0  # from an engine's start-up to full capacity
_WATCHED_S = 60.0

# `bora status --json`; empty while no controller answers.
Status = Callable[[], Awaitable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a death may cost.

    `away_s`: by then no request goes there; None: nothing that serves is hit. `full_s`: by then
    everything is as before, beyond the start-up of an engine where one starts.
    """

    name: str
    away_s: float | None
    full_s: float | None = GRACE_S
    starts_engine: bool = True
    may_fail: bool = False  # where there is only one


@dataclass(frozen=True, slots=True)
class Row:
    """What a death cost. None: nothing to measure, or it did not happen while it was watched."""

    death: Limits
    away_s: float | None
    full_s: float | None
    requests: int
    failed: int
    restarted: str
    engine_start_s: float
    example: str = ""
    wrong: str = ""  # what should not be, afterwards

    @property
    def full_limit_s(self) -> float | None:
        """Seconds until everything must be as before."""
        if self.death.full_s is None:
            return None
        return self.death.full_s + (self.engine_start_s if self.death.starts_engine else 0.0)

    @property
    def holds(self) -> bool:
        """All limits are kept."""
        away_limit, full_limit = self.death.away_s, self.full_limit_s
        away = away_limit is None or (self.away_s is not None and self.away_s <= away_limit)
        full = self.full_s is not None and (full_limit is None or self.full_s <= full_limit)
        return away and full and not self.wrong and (self.death.may_fail or self.failed == 0)

    def line(self) -> str:
        """Of the table."""
        away = "-" if self.death.away_s is None else _seconds(self.away_s, self.death.away_s)
        return (
            f"| {self.death.name} | {away} | {_seconds(self.full_s, self.full_limit_s)} "
            f"| {self.requests} | {self.failed} | {self.restarted or 'nothing'} "
            f"| {'yes' if self.holds else 'NO'} |"
        )


def _seconds(measured: float | None, limit: float | None) -> str:
    text = "never" if measured is None else f"{measured:.1f}"
    return text if limit is None else f"{text} ({limit:.1f})"


async def settled(load: SteadyStreams, status: Status, replicas: int) -> None:
    """Every replica serves, and the controller answers.

    Raises:
        CannotRun: that does not come.
    """
    begun_s = time.perf_counter()
    deadline_s = begun_s + _WATCHED_S
    while load.full_since(replicas, begun_s) is None or not load.busiest():
        _refuse_after(deadline_s, "the replicas do not all serve")
        await asyncio.sleep(0.1)
    while not await status():
        _refuse_after(deadline_s, "no controller answers")
        await asyncio.sleep(0.5)


def _refuse_after(deadline_s: float, problem: str) -> None:
    if time.perf_counter() > deadline_s:
        raise CannotRun(f"{problem} within {_WATCHED_S:g} s")


async def until_full(
    load: SteadyStreams,
    status: Status,
    replicas: int,
    since_s: float,
    victim: str,
    *,
    watched_s: float = _WATCHED_S,
) -> float | None:
    """Seconds from `since_s` until all serve again, without the victim, and the controller too."""
    answered_s: float | None = None
    while time.perf_counter() < since_s + watched_s:
        if answered_s is None and (await status()).get("gateways"):
            answered_s = time.perf_counter()  # a controller is there, and hears gateways
        full_s = load.full_since(replicas, since_s, without=victim)
        if full_s is not None and answered_s is not None:
            only_the_controller = not victim and full_s == since_s
            return (answered_s if only_the_controller else full_s) - since_s
        await asyncio.sleep(0.1)
    return None


async def replica_of(status: Status, name: str) -> Mapping[str, Any]:
    """What the status says of a replica.

    Raises:
        CannotRun: nothing.
    """
    for variant in (await status()).get("variants", ()):
        for replica in variant["replicas"]:
            if replica["replica"] == name:
                found: dict[str, Any] = replica
                return found
    raise CannotRun(f"the status names no replica {name}")


def restarted(before: Mapping[str, set[Any]], after: Mapping[str, set[Any]]) -> str:
    """How many of each kind of process are new."""
    counts = {name: len(after[name] - known) for name, known in before.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
