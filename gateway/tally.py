"""Tallies: what finished requests add up to, until the metrics are told of all of them at once.

Telling Prometheus' objects of every single request would cost more than routing it.
"""

from __future__ import annotations

from bisect import bisect_left

from gateway.record import GAP_BUCKETS_S, Record

LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
QUEUE_BUCKETS_S = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 600.0)


class Counts:
    """Values counted by bucket, as a histogram with these upper bounds has them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Tally:
    """Finished requests of one model, variant, API and tenant."""

    __slots__ = (
        *("completion_tokens", "duration", "gaps", "num_requests", "prompt_tokens", "queued"),
        *("statuses", "ttft"),
    )

    def __init__(self) -> None:
        self.num_requests = 0
        self.statuses: dict[int, int] = {}
        self.duration = Counts(LATENCY_BUCKETS_S)
        self.ttft = Counts(LATENCY_BUCKETS_S)
        self.queued = Counts(QUEUE_BUCKETS_S)
        self.gaps = Counts(GAP_BUCKETS_S)
        self.prompt_tokens = self.completion_tokens = 0

    def add(self, record: Record) -> None:
        """One more request."""
        self.num_requests += 1
        statuses, status = self.statuses, record.status
        statuses[status] = statuses.get(status, 0) + 1
        self.duration.observe(record.duration_s)
        if record.queued_s:
            self.queued.observe(record.queued_s)
        else:
            self.queued.counts[0] += 1
        if record.ttft_s is not None:
            self.ttft.observe(record.ttft_s)
        if record.gaps is not None:
            self.gaps.counts = list(map(int.__add__, self.gaps.counts, record.gaps.counts))
            self.gaps.total += record.gaps.sum_s
        usage = record.usage
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens
            self.completion_tokens += usage.completion_tokens
