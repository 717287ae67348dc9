"""Registry: what replicas last reported, and the endpoint table that follows. No Ray, no clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cluster.generations import GenerationKey, key_of
from cluster.messages import ReplicaReport
from gateway.endpoints import Endpoint, EndpointTable, ServedModel
from placement.plan import Variant


class Registry:
    """Replicas by id. A replica that does not report for `timeout_s` is forgotten."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._reports: dict[str, ReplicaReport] = {}
        self._of_variant: defaultdict[str, dict[str, ReplicaReport]] = defaultdict(dict)
        self._heard_s: dict[str, float] = {}
        self._first_s: dict[str, float] = {}
        self._retired: set[str] = set()
        self._listed: dict[str, _Listed] = {}
        self._gone_s: dict[str, float] = {}  # lost, with when they were heard last all the same

    def report(self, report: ReplicaReport, now_s: float) -> bool:
        """Take a heartbeat in; True when the replica or its state is new.

        Not of one that Serve has given up, such as on a host that was cut off: Ray ends it soon.
        """
        if report.replica in self._gone_s:
            self._gone_s[report.replica] = now_s
            return False
        before = self._reports.get(report.replica)
        if before is not None and _is_late(report, before):
            self._heard_s[report.replica] = now_s
            return False
        if report.replica in self._retired and report.state in ("ready", "unhealthy"):
            report = report.model_copy(update={"state": "draining"})  # it will hear of it
        self._keep(report)
        self._heard_s[report.replica] = now_s
        self._first_s.setdefault(report.replica, now_s)
        if report.state == "stopped":
            self._forget(report.replica)
        return before is None or before.state != report.state

    def retire(self, replica: str) -> None:
        """Send no more requests there, although it still says that it is ready."""
        self._retired.add(replica)
        self._keep(self._reports[replica].model_copy(update={"state": "draining"}))

    def _keep(self, report: ReplicaReport) -> None:
        self._reports[report.replica] = report
        self._of_variant[report.variant][report.replica] = report

    def lost(self, known: Collection[str], begun_s: float) -> list[ReplicaReport]:
        """Forget and return who is not `known` to Serve, when that was asked at `begun_s` or later.

        Whoever reported before that had been started by then, so that Serve would know it.
        """
        self._gone_s = {key: heard for key, heard in self._gone_s.items() if key not in known}
        gone = [key for key in self._reports if key not in known and self._first_s[key] < begun_s]
        self._gone_s |= {key: self._heard_s[key] for key in gone}
        return [self._forget(key) for key in gone]

    def _forget(self, replica: str) -> ReplicaReport:
        del self._heard_s[replica], self._first_s[replica]
        self._retired.discard(replica)
        self._listed.pop(replica, None)
        report = self._reports.pop(replica)
        del self._of_variant[report.variant][replica]
        return report

    def expire(self, now_s: float) -> list[ReplicaReport]:
        """Forget the silent ones and return them."""
        silent = [key for key, heard in self._heard_s.items() if now_s - heard > self._timeout_s]
        for key in [k for k, heard in self._gone_s.items() if now_s - heard > self._timeout_s]:
            del self._gone_s[key]
        return [self._forget(key) for key in silent]

    def pardon(self, seconds: float) -> None:
        """Nobody was silent in these seconds: we were not listening."""
        for heard in (self._heard_s, self._gone_s):
            for key in heard:
                heard[key] += seconds

    @property
    def reports(self) -> Collection[ReplicaReport]:
        """The last of every replica."""
        return self._reports.values()

    def get(self, replica: str) -> ReplicaReport | None:
        """Its last report."""
        return self._reports.get(replica)

    def of_generation(self, key: GenerationKey) -> list[ReplicaReport]:
        """Reports of one generation's replicas, oldest first."""
        return [report for report in self.of(key.variant) if report.version == key.version]

    def of(self, variant: str) -> list[ReplicaReport]:
        """Reports of a variant's replicas, oldest first."""
        found = self._of_variant[variant].values() if variant in self._of_variant else ()
        return sorted(found, key=lambda report: (report.started_s, report.replica))

    def ready(self, variant: Variant) -> int:
        """Number of replicas that serve in the shape that `variant` has now."""
        return sum(report.state == "ready" for report in self.of_generation(key_of(variant)))

    def table(
        self, variants: Iterable[Variant], version: int, *, outgoing: Iterable[Variant] = ()
    ) -> EndpointTable:
        """What gateways route to: ready and draining replicas of all variants, by model.

        `outgoing` are shapes that are being replaced, and serve on meanwhile. Draining replicas
        get no new requests, except those that only they can answer.
        """
        variants = tuple(variants)
        of_model: defaultdict[str, list[Variant]] = defaultdict(list)
        for variant in variants:
            of_model[variant.model].append(variant)
        models: dict[str, ServedModel] = {}
        for variant in variants:
            same = of_model[variant.model]
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
                    adapters=tuple(dict.fromkeys(name for each in same for name in each.adapters)),
                ),
            )
        shapes = {key_of(variant): variant for variant in outgoing if variant.model in models}
        names = {variant.variant: variant for variant in (*variants, *shapes.values())}
        names |= {variant.variant: variant for variant in variants}
        shapes |= {key_of(variant): variant for variant in variants}
        endpoints = tuple(
            self._endpoint(shapes.get(GenerationKey(name, report.version), variant), report)
            for name, variant in names.items()
            for report in self.of(name)
            if report.state in ("ready", "draining")
        )
        return EndpointTable(version=version, models=tuple(models.values()), endpoints=endpoints)

    def _endpoint(self, variant: Variant, report: ReplicaReport) -> Endpoint:
        """The same object as in the last table, if nothing about it is new."""
        told = (report.url, report.api_key, report.state, report.adapters)
        last = self._listed.get(report.replica)
        if last is None or last.variant is not variant or last.told != told:
            last = _Listed(variant, told, _endpoint(variant, report))
            self._listed[report.replica] = last
        return last.endpoint


@dataclass(frozen=True, slots=True)
class _Listed:
    """An endpoint of the last table, and what it was made of."""

    variant: Variant
    told: tuple[object, ...]  # of the replica's report
    endpoint: Endpoint


def _is_late(report: ReplicaReport, before: ReplicaReport) -> bool:
    """Whether a later one has overtaken it on the way, as calls of one actor may."""
    return report.started_s == before.started_s and report.number < before.number


def _endpoint(variant: Variant, report: ReplicaReport) -> Endpoint:
    return Endpoint(
        role=variant.role,
        id=report.replica,
        model=variant.model,
        variant=variant.variant,
        url=report.url,
        served_model_name=variant.model,
        # Beyond what runs at once an engine queues a little: it keeps its batch full.
        max_in_flight=2 * variant.shape.request_slots,
        max_model_len=variant.shape.max_model_len,
        engine=variant.shape.engine,
        api_key=report.api_key or None,
        state="draining" if report.state == "draining" else "ready",
        adapters=report.adapters,
        tokens_per_s=variant.shape.prediction.output_tokens_per_s or None,
    )
