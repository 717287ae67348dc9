"""The metrics of tenants and of waiting. Only tenants with a key become labels, so they are few."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from gateway.record import Record
from gateway.tally import QUEUE_BUCKETS_S, Counts, Tally

_REFUSED = frozenset((401, 403, 429, 503))


class TenantMetrics:
    """Told now and then of what has finished."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queue_time = Histogram(
            "bora_gateway_queue_time_seconds",
            "How long requests waited for a place, those that did not wait included.",
            ("model",),
            buckets=QUEUE_BUCKETS_S,
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

    def refused(self, record: Record) -> None:
        """A request was turned away."""
        if record.status in _REFUSED:
            self._refusals.labels(record.tenant, record.refusal).inc()

    def add(self, tenant: str, model: str, tally: Tally) -> None:
        """Requests of `tenant` (empty: of nobody known) to `model` are over."""
        add_counts(self._queue_time.labels(model), tally.queued)
        if tenant:
            self._requests.labels(tenant, model).inc(tally.num_requests)
            self._tokens.labels(tenant, model, "prompt").inc(tally.prompt_tokens)
            self._tokens.labels(tenant, model, "completion").inc(tally.completion_tokens)


def add_counts(histogram: Histogram, counts: Counts) -> None:
    """Add what was counted. prometheus-client has no public way to (its buckets are counters)."""
    for bucket, count in zip(histogram._buckets, counts.counts, strict=True):  # noqa: SLF001
        if count:
            bucket.inc(count)
    if counts.total:
        histogram._sum.inc(counts.total)  # noqa: SLF001
