"""Record: what happened to one request, for metrics, the access log and traces."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gateway.usage import Usage

# Upper bounds of the histogram of times between the events of a stream, seconds.
GAP_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0),
)


class Gaps:
    """Times between the events of one stream (inter-token latency), counted by bucket."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(GAP_BUCKETS_S) + 1)
        self.sum_s = 0.0


@dataclass(slots=True)
class Record:
    """What happened to one request. Unknown names stay out of `model`: it is a metric's label."""

    api: str
    path: str
    request_id: str
    tenant: str = ""
    model: str = ""
    variant: str = ""
    endpoint: str = ""
    status: int = 500
    error: str = ""
    attempts: int = 0
    migrations: int = 0
    more_headers: bytes = b""  # lines for the client: who else had a part in the answer
    queued_s: float = 0.0
    ttft_s: float | None = None
    duration_s: float = 0.0
    usage: Usage | None = None
    answer_chunks: int = 0  # events, or tokens guessed from a body, where no usage is told
    refusal: str = ""  # an error's code
    gaps: Gaps | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        """Seconds since it came in."""
        return time.monotonic() - self.started
