"""Record: what happened to one request, for metrics, the access log and traces."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gateway.usage import Usage


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
    queued_s: float = 0.0
    ttft_s: float | None = None
    duration_s: float = 0.0
    usage: Usage | None = None
    answer_chunks: int = 0  # events, or tokens guessed from a body, where no usage is told
    refusal: str = ""  # an error's code
    started: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        """Seconds since it came in."""
        return time.monotonic() - self.started
