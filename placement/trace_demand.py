"""A demand from a trace of requests: what to size for, and the lengths of prompts and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from placement.demand import Demand, TokenLengths
from placement.errors import ConfigError, nearest
from placement.spec import Spec, mistake
from placement.trace import TraceRequest, read_trace

WINDOW_S = 60.0
BUSY_SHARE = 0.99  # of the requests, that come in minutes no busier than what is planned for
_NAMES_KEPT = 100  # models of a trace, for errors


class TraceDemand(Spec):
    """Instead of numbers in `models[].demand`: a trace of requests that they are derived from."""

    trace: str = Field(
        min_length=1,
        description="File, relative to this one: `.parquet`, `.csv`, `.jsonl`, the latter two also "
        "`.gz`, sorted by `timestamp_s`, with `input_tokens` and `output_tokens`. Prompts and "
        "answers have its mean and 95th percentile; the rate is that of a busy minute: 99 % of the "
        "requests come in minutes no busier.",
    )
    model: str | None = Field(
        default=None, description="Only requests with this `model` in the trace; None: all."
    )
    start_s: NonNegativeFloat = Field(
        default=0.0, description="Only requests from this second of the trace on."
    )
    duration_s: float | None = Field(
        default=None, ge=WINDOW_S, description="Only those of so many seconds; None: to the end."
    )
    rate_scale: PositiveFloat = Field(default=1.0, description="Times so many requests.")
    prefix_hit: NonNegativeFloat = Field(
        default=0.0, le=1.0, description="Share of prompt tokens that the prefix cache has."
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_or_a_trace(cls, data: Any) -> Any:
        for key in ("requests_per_s", "input_tokens", "output_tokens", "source"):
            if isinstance(data, Mapping) and key in data:
                raise mistake("is derived from the trace; leave out either of them", key)
        return data


def demand_of(wish: TraceDemand, folder: Path) -> Demand:
    """The demand that plans are made for, from a trace whose name is relative to `folder`.

    A plan carries requests that come at random at its rate (Poisson), and what lasts less than an
    engine takes to start is no matter of replicas. So the trace is cut into minutes from its first
    request on, and the rate is that of the least busy minute such that at least 99 % of the
    requests come in minutes no busier than it: of an hour the busiest minute, of days what all but
    the rarest minutes need. Requests are counted, not minutes, since service levels are of
    requests: silent nights change nothing. An unfinished last minute counts as a whole one.

    Raises:
        ConfigError: the trace is wrong (`read_trace`), too short, or has no such requests.
    """
    path = folder / Path(wish.trace).expanduser()
    tally = _Tally(wish)
    for request in _within(read_trace(path), wish):
        tally.add(request)
    tally.check(path)
    return Demand(
        requests_per_s=tally.busy_minute() / WINDOW_S * wish.rate_scale,
        input_tokens=_lengths(path, "input_tokens", tally.inputs),
        output_tokens=_lengths(path, "output_tokens", tally.outputs),
        prefix_hit=wish.prefix_hit,
        source=tally.in_words(),
    )


def percentile(counts: Mapping[int, int], percent: float) -> float:
    """Of values that occur so often: as `numpy.percentile` of all of them, linear between two."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    place = (int(ends[-1]) - 1) * percent / 100
    low, high = (
        values[int(np.searchsorted(ends, rank, side="right"))]
        for rank in (math.floor(place), math.ceil(place))
    )
    return low + (high - low) * (place - math.floor(place))


def _within(requests: Iterable[TraceRequest], wish: TraceDemand) -> Iterable[TraceRequest]:
    end_s = math.inf if wish.duration_s is None else wish.start_s + wish.duration_s
    for request in requests:
        if request.arrival_s >= end_s:
            return
        if request.arrival_s >= wish.start_s:
            yield request


@dataclass(slots=True)
class _Tally:
    """Counts by value, which are few however long the trace is."""

    wish: TraceDemand
    first_s: float | None = None  # of all models
    last_s: float = 0.0
    names: set[str] = field(default_factory=set)
    minutes: Counter[int] = field(default_factory=Counter)
    inputs: Counter[int] = field(default_factory=Counter)
    outputs: Counter[int] = field(default_factory=Counter)

    def add(self, request: TraceRequest) -> None:
        """Count one that came within the time asked for."""
        if self.first_s is None:
            self.first_s = request.arrival_s
        self.last_s = request.arrival_s
        if len(self.names) < _NAMES_KEPT:
            self.names.add(request.model)
        if self.wish.model is None or request.model == self.wish.model:
            self.minutes[int((request.arrival_s - self.first_s) // WINDOW_S)] += 1
            self.inputs[request.input_tokens] += 1
            self.outputs[request.output_tokens] += 1

    @property
    def span_s(self) -> float:
        """From the first request to the last, of all models."""
        return self.last_s - (self.first_s or 0.0)

    def check(self, path: Path) -> None:
        """That there are requests to derive anything from."""
        if self.first_s is None:
            until = "" if self.wish.duration_s is None else f" for {self.wish.duration_s:g} s"
            raise ConfigError(
                f"{path}: no request from second {self.wish.start_s:g} on{until}; give another "
                "start_s or duration_s"
            )
        if not self.minutes:
            names = [name for name in self.names if name]
            hint = nearest(self.wish.model or "", names) or "; it names none: leave `model` out"
            raise ConfigError(f"{path}: model: no request has {self.wish.model!r}{hint}")
        if self.span_s < WINDOW_S:
            raise ConfigError(
                f"{path}: its requests come within {self.span_s:g} s, and rates are taken of "
                f"minutes; give a longer trace, or requests_per_s and lengths"
            )

    def busy_minute(self) -> int:
        """Requests of the least busy minute such that 99 % come in minutes no busier."""
        wanted = BUSY_SHARE * self.minutes.total()
        seen = 0
        for count in sorted(self.minutes.values()):
            seen += count
            if seen >= wanted:
                break
        return count

    def in_words(self) -> str:
        """Where the figures come from."""
        requests, scale = self.minutes.total(), self.wish.rate_scale
        named = sorted(self.names - {""})
        of = f" of {self.wish.model}" if self.wish.model is not None else ""
        if not of and len(named) > 1:
            of = f" of all {len(named)} models"
        times = "" if scale == 1 else f", rates times {scale:g}"
        return (
            f"from {self.wish.trace}: {requests:,} requests{of} in {_time(self.span_s)}{times}, "
            f"{BUSY_SHARE:.0%} of them in minutes no busier than that; mean "
            f"{requests / self.span_s * scale:.3g}/s, busiest minute "
            f"{max(self.minutes.values()) / WINDOW_S * scale:.3g}/s"
        )


def _lengths(path: Path, column: str, counts: Mapping[int, int]) -> TokenLengths:
    """Mean and 95th percentile; without that where a few very long ones raise the mean above it."""
    total = sum(value * count for value, count in counts.items())
    if total == 0:
        raise ConfigError(
            f"{path}: {column}: all are 0; give a trace of requests that were answered"
        )
    mean, p95 = total / sum(counts.values()), percentile(counts, 95)
    return TokenLengths(mean=mean, p95=p95 if p95 >= mean else None)


def _time(seconds: float) -> str:
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
