"""Registry: what replicas last reported, and the endpoint table that follows. No Ray, no clock."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.messages import ReplicaReport
from cluster.shape_version import shape_version
from gateway.endpoints import Endpoint, EndpointTable, ServedModel
from placement.plan import Variant


class Registry:
    """Replicas by id. A replica that does not report for `timeout_s` is forgotten."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._reports: dict[str, ReplicaReport] = {}
        self._heard_s: dict[str, float] = {}

    def report(self, report: ReplicaReport, now_s: float) -> bool:
        """Take a heartbeat in; True when the replica or its state is new."""
        before = self._reports.get(report.replica)
        self._reports[report.replica] = report
        self._heard_s[report.replica] = now_s
        if report.state == "stopped":
            del self._reports[report.replica], self._heard_s[report.replica]
        return before is None or before.state != report.state

    def expire(self, now_s: float) -> list[ReplicaReport]:
        """Forget the silent ones and return them."""
        silent = [key for key, heard in self._heard_s.items() if now_s - heard > self._timeout_s]
        for key in silent:
            del self._heard_s[key]
        return [self._reports.pop(key) for key in silent]

    def pardon(self, seconds: float) -> None:
        """Nobody was silent in these seconds: we were not listening."""
        for key in self._heard_s:
            self._heard_s[key] += seconds

    def of(self, variant: str) -> list[ReplicaReport]:
        """Reports of a variant's replicas, oldest first."""
        found = [report for report in self._reports.values() if report.variant == variant]
        return sorted(found, key=lambda report: (report.started_s, report.replica))

    def ready(self, variant: Variant) -> int:
        """Number of replicas that serve in the shape that `variant` has now."""
        version = shape_version(variant)
        return sum(
            report.state == "ready" and report.version == version
            for report in self.of(variant.variant)
        )

    def table(self, variants: Iterable[Variant], version: int) -> EndpointTable:
        """What gateways route to: every variant's ready replicas, by model."""
        variants = tuple(variants)
        models: dict[str, ServedModel] = {}
        for variant in variants:
            same = [each for each in variants if each.model == variant.model]
            models.setdefault(
                variant.model,
                ServedModel(
                    name=variant.model,
                    aliases=variant.aliases,
                    max_model_len=min(each.shape.max_model_len for each in same),
                    capabilities=variant.capabilities,
                    scalable=all(each.bounds.min == 0 for each in same),
                    managed=True,
                    routing=variant.routing,
                    fallback=variant.fallback,
                ),
            )
        endpoints = tuple(
            _endpoint(variant, report)
            for variant in variants
            for report in self.of(variant.variant)
            if report.state == "ready"
        )
        return EndpointTable(version=version, models=tuple(models.values()), endpoints=endpoints)


def _endpoint(variant: Variant, report: ReplicaReport) -> Endpoint:
    return Endpoint(
        id=report.replica,
        model=variant.model,
        variant=variant.variant,
        url=report.url,
        served_model_name=variant.model,
        # Beyond what runs at once an engine queues a little: it keeps its batch full.
        max_in_flight=2 * variant.shape.max_num_seqs,
        max_model_len=variant.shape.max_model_len,
        engine=variant.shape.engine,
        api_key=report.api_key or None,
        tokens_per_s=variant.shape.prediction.output_tokens_per_s or None,
    )
