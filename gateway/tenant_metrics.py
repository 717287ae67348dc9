"""The metrics of tenants and of waiting. Only tenants with a key become labels, so they are few."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from gateway.record import Record

_QUEUE_BUCKETS_S = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 600.0)
_REFUSED = frozenset((401, 403, 429, 503))


class TenantMetrics:
    """`finished` is called once per request."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queue_times: dict[str, Histogram] = {}
        self._of_tenants: dict[tuple[str, str], tuple[Counter, Counter, Counter]] = {}
        self._queue_time = Histogram(
            "bora_gateway_queue_time_seconds",
            "How long requests waited for a place, those that did not wait included.",
            ("model",),
            buckets=_QUEUE_BUCKETS_S,
            registry=registry,
        )
        self._refusals = Counter(
            "bora_gateway_refusals",
            "Requests refused, by the error's code (401, 403, 429 and 503).",
            ("tenant", "reason"),
            registry=registry,
        )
        self._requests = Counter(
            "bora_gateway_tenant_requests",
            "Requests of a tenant that were answered or failed.",
            ("tenant", "model"),
            registry=registry,
        )
        self._tokens = Counter(
            "bora_gateway_tenant_tokens",
            "Tokens of a tenant (kind: prompt or completion), where the engine's answer tells.",
            ("tenant", "model", "kind"),
            registry=registry,
        )

    def finished(self, record: Record) -> None:
        """A request is over."""
        model = record.model
        if model:
            queue_time = self._queue_times.get(model)
            if queue_time is None:
                queue_time = self._queue_times[model] = self._queue_time.labels(model)
            queue_time.observe(record.queued_s)
        if record.refusal and record.status in _REFUSED:
            self._refusals.labels(record.tenant, record.refusal).inc()
        if record.tenant and model:
            self._count(record)

    def _count(self, record: Record) -> None:
        tenant, model = record.tenant, record.model
        series = self._of_tenants.get((tenant, model))
        if series is None:
            series = self._of_tenants[tenant, model] = (
                self._requests.labels(tenant, model),
                self._tokens.labels(tenant, model, "prompt"),
                self._tokens.labels(tenant, model, "completion"),
            )
        requests, prompt, completion = series
        requests.inc()
        if record.usage is not None:
            prompt.inc(record.usage.prompt_tokens)
            completion.inc(record.usage.completion_tokens)
