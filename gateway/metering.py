"""Meter: Prometheus metrics and the access log, fed by one Record per request."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from gateway.access_log import AccessLog
from gateway.endpoints import Endpoint
from gateway.record import GAP_BUCKETS_S, Record
from gateway.routing import EndpointState
from gateway.tally import LATENCY_BUCKETS_S, Tally
from gateway.tenant_metrics import TenantMetrics, add_counts

_TABLE_DELAY_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.0, 5.0),
)


class Meter:
    """The gateway's metrics (`bora_gateway_*`). With several workers they are summed by scraping any."""

    def __init__(self, access_log: AccessLog | None = None) -> None:
        self._access_log = access_log
        self._tallies: dict[tuple[str, str, str, str], Tally] = {}
        self._at_engines: dict[tuple[str, str], int] = {}
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
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._duration = Histogram(
            "bora_gateway_request_duration_seconds",
            "From the request to the end of the answer.",
            request,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._gaps = Histogram(
            "bora_gateway_inter_token_latency_seconds",
            "Between the events of a stream, counted when it ends.",
            ("model", "variant"),
            buckets=GAP_BUCKETS_S,
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
        self._migrations = Counter(
            "bora_gateway_migrations",
            "Streams that another endpoint went on with.",
            ("model",),
            registry=registry,
        )
        self._prefills = Histogram(
            "bora_gateway_prefill_duration_seconds",
            "Prompts sent to prefill endpoints, by what came of it, until the answer could begin.",
            ("model", "variant", "outcome"),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._of_tenants = TenantMetrics(registry)
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
        self._table_delay = Histogram(
            "bora_gateway_endpoint_table_delay_seconds",
            "From when the controller heard of a change until this gateway routes by it.",
            buckets=_TABLE_DELAY_BUCKETS_S,
            registry=registry,
        )
        self._counted_models: set[str] = set()
        self._told_endpoints: set[tuple[str, str, str]] = set()
        endpoint = ("model", "variant", "endpoint")
        self._alive = Gauge(
            "bora_gateway_endpoint_alive",
            "1: takes requests; 0: dead, its health checks fail.",
            endpoint,
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._breaker_open = Gauge(
            "bora_gateway_endpoint_breaker_open",
            "1: the endpoint failed, or is far slower than its peers, and is left alone.",
            endpoint,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._ejections = Counter(
            "bora_gateway_endpoint_ejections",
            "Times that it was left alone for being slow.",
            endpoint,
            registry=registry,
        )

    def finished(self, record: Record) -> None:
        """Count a request that is over and write its access log line."""
        record.duration_s = record.age_s
        key = (record.model, record.variant, record.api, record.tenant)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally()
        tally.add(record)
        if record.refusal:
            self._of_tenants.refused(record)
        if self._access_log is not None:
            self._access_log.add(record)

    def flush(self) -> None:
        """Tell the metrics of what has finished. Scraping does so, and the gateway every second."""
        tallies, self._tallies = self._tallies, {}
        for (model, variant, api, tenant), tally in tallies.items():
            for status, count in tally.statuses.items():
                self._requests.labels(model, variant, api, str(status)).inc(count)
            add_counts(self._duration.labels(model, variant, api), tally.duration)
            add_counts(self._ttft.labels(model, variant, api), tally.ttft)
            add_counts(self._gaps.labels(model, variant), tally.gaps)
            self._prompt_tokens.labels(model, variant).inc(tally.prompt_tokens)
            self._completion_tokens.labels(model, variant).inc(tally.completion_tokens)
            if model:
                self._of_tenants.add(tenant, model, tally)
        for (model, variant), count in self._at_engines.items():
            self._in_flight.labels(model, variant).set(count)

    def retried(self, model: str, reason: str) -> None:
        """A request goes to another endpoint, because of an error's `code` or a status."""
        self._retries.labels(model, reason).inc()

    def migrated(self, model: str) -> None:
        """A stream goes on at another endpoint."""
        self._migrations.labels(model).inc()

    def prefilled(self, endpoint: Endpoint, outcome: str, seconds: float) -> None:
        """A prompt was sent to be read at `endpoint`, for an answer of another one."""
        self._prefills.labels(endpoint.model, endpoint.variant, outcome).observe(seconds)

    def at_engine(self, model: str, variant: str, change: int) -> None:
        """A request went to an engine (1) or left it (-1)."""
        key = model, variant
        self._at_engines[key] = self._at_engines.get(key, 0) + change

    @contextmanager
    def queued(self, model: str) -> Iterator[None]:
        """Counts a request that waits."""
        with self._queued.labels(model).track_inprogress():
            yield

    def endpoint_changed(self, state: EndpointState, now: float) -> None:
        """An endpoint's breaker or health is not what it was."""
        endpoint, breaker = state.endpoint, state.breaker
        labels = (endpoint.model, endpoint.variant, endpoint.key)
        self._told_endpoints.add(labels)
        self._alive.labels(*labels).set(not state.dead)
        self._breaker_open.labels(*labels).set(not breaker.closed)
        if breaker.is_slow and breaker.state(now) == "open":
            self._ejections.labels(*labels).inc()

    def table_delayed(self, seconds: float) -> None:
        """A table from the controller is in force so long after what it tells happened."""
        self._table_delay.observe(max(seconds, 0.0))  # hosts' clocks may differ a little

    def endpoints_listed(self, endpoints: Iterable[Endpoint]) -> None:
        """The table's endpoints: those that are gone must not look dead for ever."""
        listed = {(each.model, each.variant, each.key) for each in endpoints}
        for labels in self._told_endpoints - listed:
            self._alive.labels(*labels).set(1)
            self._breaker_open.labels(*labels).set(0)
            if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # there, series cannot be removed
                self._alive.remove(*labels)
                self._breaker_open.remove(*labels)
        self._told_endpoints &= listed

    def table_applied(self, version: int, ready: Iterable[tuple[str, int]]) -> None:
        """A new endpoint table: its version, and how many endpoints each model has."""
        self._table_version.set(version)
        counts = dict.fromkeys(self._counted_models, 0) | dict(ready)
        for model, count in counts.items():
            self._endpoints.labels(model).set(count)
        self._counted_models |= counts.keys()

    def totals(self, names: Collection[str]) -> Iterable[Metric]:
        """The series of those names, of all workers when there are several.

        Without the making and reading of text this costs a fifth of `exposition`.
        """
        self.flush()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            summed = CollectorRegistry()
            MultiProcessCollector(summed)  # type: ignore[no-untyped-call]
            return summed.collect()
        return self._registry.restricted_registry(names).collect()

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format as of the last `flush`, of all workers.

        May run in a thread: it takes as long as there are series.
        """
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            summed = CollectorRegistry()
            MultiProcessCollector(summed)  # type: ignore[no-untyped-call]
            return generate_latest(summed)
        return generate_latest(self._registry)
