"""Meter: Prometheus metrics and the access log, fed by one Record per request."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from gateway.usage import Usage

_access = logging.getLogger("gateway.access")
_LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


@dataclass(slots=True)
class Record:
    """What happened to one request. Unknown names stay out of `model`: it is a metric's label."""

    api: str
    path: str
    request_id: str
    model: str = ""
    variant: str = ""
    endpoint: str = ""
    status: int = 500
    error: str = ""
    attempts: int = 0
    queued_s: float = 0.0
    ttft_s: float | None = None
    usage: Usage | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        """Seconds since it came in."""
        return time.monotonic() - self.started


class Meter:
    """The gateway's metrics (`bora_gateway_*`). With several workers they are summed by scraping any."""

    def __init__(self, *, access_log: bool = True) -> None:
        self._access_log = access_log
        self._registry = registry = CollectorRegistry()
        request = ("model", "variant", "api")
        self._requests = Counter(
            "bora_gateway_requests",
            "Requests by final status (499: the client left).",
            (*request, "status"),
            registry=registry,
        )
        self._ttft = Histogram(
            "bora_gateway_time_to_first_token_seconds",
            "From the request to the first byte of a stream.",
            request,
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._duration = Histogram(
            "bora_gateway_request_duration_seconds",
            "From the request to the end of the answer.",
            request,
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "bora_gateway_prompt_tokens",
            "Tokens in, where the engine's answer tells.",
            ("model", "variant"),
            registry=registry,
        )
        self._completion_tokens = Counter(
            "bora_gateway_completion_tokens",
            "Tokens out, where the engine's answer tells.",
            ("model", "variant"),
            registry=registry,
        )
        self._retries = Counter(
            "bora_gateway_retries",
            "Further attempts at another endpoint.",
            ("model", "reason"),
            registry=registry,
        )
        self._add_gauges(registry)

    def _add_gauges(self, registry: CollectorRegistry) -> None:
        self._in_flight = Gauge(
            "bora_gateway_in_flight",
            "Requests at engines.",
            ("model", "variant"),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queued = Gauge(
            "bora_gateway_queued",
            "Requests that wait for a place or a replica.",
            ("model",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._endpoints = Gauge(
            "bora_gateway_endpoints",
            "Ready endpoints.",
            ("model",),
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._table_version = Gauge(
            "bora_gateway_endpoint_table_version",
            "Version of the endpoint table in use.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._counted_models: set[str] = set()

    def finished(self, record: Record) -> None:
        """Count a request that is over and write its access log line."""
        labels = (record.model, record.variant, record.api)
        self._requests.labels(*labels, str(record.status)).inc()
        self._duration.labels(*labels).observe(record.age_s)
        if record.ttft_s is not None:
            self._ttft.labels(*labels).observe(record.ttft_s)
        if record.usage:
            self._prompt_tokens.labels(*labels[:2]).inc(record.usage.prompt_tokens)
            self._completion_tokens.labels(*labels[:2]).inc(record.usage.completion_tokens)
        if self._access_log and _access.isEnabledFor(logging.INFO):
            _access.info("%s", _access_line(record))

    def retried(self, model: str, reason: str) -> None:
        """A request goes to another endpoint, because of an error's `code` or a status."""
        self._retries.labels(model, reason).inc()

    def at_engine(self, model: str, variant: str, change: int) -> None:
        """A request went to an engine (1) or left it (-1)."""
        self._in_flight.labels(model, variant).inc(change)

    @contextmanager
    def queued(self, model: str) -> Iterator[None]:
        """Counts a request that waits."""
        with self._queued.labels(model).track_inprogress():
            yield

    def table_applied(self, version: int, ready: Iterable[tuple[str, int]]) -> None:
        """A new endpoint table: its version, and how many endpoints each model has."""
        self._table_version.set(version)
        counts = dict.fromkeys(self._counted_models, 0) | dict(ready)
        for model, count in counts.items():
            self._endpoints.labels(model).set(count)
        self._counted_models |= counts.keys()

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format, of all workers when there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            summed = CollectorRegistry()
            MultiProcessCollector(summed)  # type: ignore[no-untyped-call]
            return generate_latest(summed)
        return generate_latest(self._registry)


def _access_line(record: Record) -> str:
    usage = record.usage
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "api": record.api,
        "path": record.path,
        "model": record.model,
        "variant": record.variant,
        "endpoint": record.endpoint,
        "status": record.status,
        "duration_s": round(record.age_s, 4),
        "queued_s": round(record.queued_s, 4),
        "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 4),
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "attempts": record.attempts,
        "error": record.error or None,
    }
    return json.dumps(line)
