"""Pace: how fast an endpoint works, from finished requests, and what follows for its share of work.

A request's seconds per unit of work are a + b x n, with n requests running beside it: up to a/b of
them cost nearly nothing. So (n + a/b) / pace is what the endpoint does per second under full load,
and it does not change with n: an endpoint does not look fast or slow for being little or much used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_KEPT = 0.95  # of the past, with each request
_FREE_COMPANY = 8.0  # a/b: 16 to 64 for GPUs and small models, few where compute is the limit
_DOUBTED_REQUESTS = 4.0  # so many count for the assumption that it is like its peers
_HALF_LIFE_S = 60.0  # of what was seen of an endpoint that got no requests since
_NORMAL = 1.25  # within this factor of its plan an endpoint is as planned
_RANGE = 10.0
_ENOUGH = 5.0  # requests, for a verdict


@dataclass(slots=True, eq=False)
class Pace:
    """Sums over finished requests, in which the past fades."""

    requests: float = 0.0
    seconds: float = 0.0
    work: float = 0.0
    company: float = 0.0  # seconds x requests that ran
    observed_at: float = -math.inf

    def observe(self, *, seconds: float, work: float, crowd: float, now: float) -> None:
        """A request of `work` took `seconds`, while `crowd` ran, itself included."""
        self.requests = self.requests * _KEPT + 1
        self.seconds = self.seconds * _KEPT + seconds
        self.work = self.work * _KEPT + work
        self.company = self.company * _KEPT + seconds * crowd
        self.observed_at = now

    def forget(self) -> None:
        """What was seen holds no more."""
        self.requests = self.seconds = self.work = self.company = 0.0
        self.observed_at = -math.inf

    @property
    def has_enough(self) -> bool:
        """There is enough for a verdict."""
        return self.requests >= _ENOUGH * 0.9 and self.work > 0

    @property
    def seconds_per_work(self) -> float | None:
        """As a request sees it; None: nothing was observed."""
        return self.seconds / self.work if self.work > 0 else None

    @property
    def work_per_s(self) -> float | None:
        """Under full load; None: nothing was observed."""
        if self.work <= 0 or self.seconds <= 0:
            return None
        return (self.company / self.seconds + _FREE_COMPANY) * self.work / self.seconds

    def output_tokens_per_s(self, output_token_work: int) -> float | None:
        """Throughput with the requests that ran beside each other, if all work were decode."""
        if self.work <= 0 or self.seconds <= 0:
            return None
        return self.company / self.seconds * self.work / self.seconds / output_token_work

    def trust(self, now: float) -> float:
        """How much of it to believe, 0 to 1."""
        age = max(now - self.observed_at, 0.0)
        return self.requests / (self.requests + _DOUBTED_REQUESTS) * math.exp2(-age / _HALF_LIFE_S)


def speeds(planned: Sequence[float], paces: Sequence[Pace], now: float) -> list[float]:
    """What each endpoint of a model does per second, relative to the others, as now believed.

    Plans are right until observed otherwise: only how far an endpoint is off its plan beside the
    others counts, as all of them may be off by the same factor.
    """
    ratios = [
        None if (seen := pace.work_per_s) is None else seen / plan
        for plan, pace in zip(planned, paces, strict=True)
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    usual = median(known) if len(known) > 1 else None
    result = []
    for plan, pace, ratio in zip(planned, paces, ratios, strict=True):
        off = 1.0
        if usual and ratio is not None:
            off = min(max(ratio / usual, 1 / _RANGE), _RANGE) ** pace.trust(now)
            off = 1.0 if 1 / _NORMAL < off < _NORMAL else off
        result.append(plan * off)
    return result


def outliers(paces: Sequence[Pace], factor: float) -> list[int]:
    """Indices of those slower than `factor` x the median of at least 2 peers, slowest first.

    At most half of all.
    """
    judged = [(i, pace.seconds_per_work) for i, pace in enumerate(paces) if pace.has_enough]
    known = [(i, seconds) for i, seconds in judged if seconds is not None]
    found = []
    for i, seconds in known:
        peers = [other for j, other in known if j != i]
        if len(peers) >= 2 and seconds > factor * median(peers):
            found.append((seconds, i))
    return [i for _, i in sorted(found, reverse=True)][: len(paces) // 2]
